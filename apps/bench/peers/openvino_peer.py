"""Another runtime beside ours: OpenVINO, with a decoder of Qwen2.5's shape or with products alone, on random weights.

Owns what OpenVINO runs: weights of 4 or 8 bits in groups, its fused attention over a stateful cache of 8 bits, dynamic
quantisation of activations. A script of its own, so that it can run in an environment that has `openvino` and nothing
of ours. Answers requests as `apps.bench.model_worker` does.

    python openvino_peer.py decoder '{"layers": 36, "hidden_size": 2048, ...}' --threads 2
    python openvino_peer.py products '{"inputs": 2048, "outputs": 22016, "bits": 4, "weights": 3}' --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

SETTLE_S = 0.05
"""Between two measurements, so that the threads of whoever came before have stopped spinning."""


def weight(random: np.random.Generator, rows: int, columns: int, bits: int, block: int) -> Any:
    """(N, K) of random codes with a scale for each group along K, in the form that OpenVINO keeps compressed."""
    import openvino as ov
    from openvino import opset13 as ops

    groups = columns // block
    codes = np.frombuffer(random.bytes(rows * columns * bits // 8), np.uint8).copy()
    shape = ov.Shape([rows, groups, block])
    tensor = ov.Tensor(codes, shape, ov.Type.i4) if bits == 4 else ov.Tensor(codes.view(np.int8).reshape(shape))
    scales = (random.random((rows, groups, 1), np.float32) * 0.01 + 0.005).astype(np.float16)
    values = ops.multiply(ops.convert(ops.constant(tensor, shared_memory=False), "f16"), ops.constant(scales))
    whole = ops.reshape(values, ops.constant(np.array([rows, columns], np.int64)), False)
    return ops.convert(whole, "f32")


def properties(threads: int, block: int, kv_type: str) -> dict[str, Any]:
    """How OpenVINO is to run: fastest for one request, activations of quantised products in 8 bits by block."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": kv_type,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": block,
    }


class Products:
    """Several products of the same input, each with its own weights."""

    def __init__(self, shape: dict[str, int], threads: int, block: int) -> None:
        import openvino as ov
        from openvino import opset13 as ops

        self._random = np.random.default_rng(4)
        given = ops.parameter([-1, shape["inputs"]], ov.Type.f32, name="input")
        results = []
        for _ in range(shape["weights"]):
            matrix = weight(self._random, shape["outputs"], shape["inputs"], shape["bits"], block)
            results.append(ops.result(ops.matmul(given, matrix, False, True)))
        model = ov.Model(results, [given], "products")
        self._request = ov.Core().compile_model(model, "CPU", properties(threads, block, "u8")).create_infer_request()
        self._inputs = shape["inputs"]

    def measure(self, tokens: int) -> float:
        """Milliseconds of all products of `tokens` rows."""
        given = self._random.standard_normal((tokens, self._inputs), np.float32)
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        self._request.infer({"input": given})
        return (time.perf_counter() - start) * 1e3


class Model:
    """The compiled decoder. Weights are random and differ by layer; only time is of interest."""

    def __init__(self, shape: dict[str, int], threads: int, block: int, kv_type: str) -> None:
        import openvino

        self._openvino = openvino
        self.shape, self.block = shape, block
        self._random = np.random.default_rng(3)
        compiled = openvino.Core().compile_model(self._graph(), "CPU", properties(threads, block, kv_type))
        self._request = compiled.create_infer_request()
        self._filled = 0

    def _linear(self, values: Any, inputs: int, outputs: int, bits: int = 4) -> Any:
        from openvino import opset13 as ops

        return ops.matmul(values, weight(self._random, outputs, inputs, bits, self.block), False, True)

    def _norm(self, values: Any) -> Any:
        from openvino import opset13 as ops

        mean = ops.reduce_mean(ops.power(values, np.float32(2)), np.array([-1], np.int64), True)
        inverse = ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(1e-6))))
        weight = np.ones((1, 1, self.shape["hidden_size"]), np.float32)
        return ops.multiply(ops.constant(weight), ops.multiply(values, inverse))

    def _rotate(self, values: Any, cos: Any, sin: Any) -> Any:
        from openvino import opset13 as ops

        half = self.shape["head_dim"] // 2
        first, second = ops.variadic_split(values, np.int64(-1), np.array([half, half], np.int64)).outputs()
        turned = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        return ops.add(ops.multiply(values, cos), ops.multiply(turned, sin))

    def _heads(self, values: Any, heads: int) -> Any:
        from openvino import opset13 as ops

        split = ops.reshape(values, np.array([0, 0, heads, self.shape["head_dim"]], np.int64), True)
        return ops.transpose(split, np.array([0, 2, 1, 3], np.int64))

    def _cached(self, new: Any, name: str, beam: Any, sinks: list[Any]) -> Any:
        """The stateful cache with the new rows behind it, every key head repeated for its group of query heads."""
        ov = self._openvino
        from openvino import opset13 as ops
        from openvino.op.util import Variable, VariableInfo

        heads, width = self.shape["num_kv_heads"], self.shape["head_dim"]
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, heads, -1, width])
        info.data_type = ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        empty = ops.constant(np.zeros((1, heads, 0, width), np.float32))
        past = ops.gather(ops.read_value(empty, variable), beam, np.int64(0))
        whole = ops.concat([past, new], 2)
        sinks.append(ops.assign(whole, variable))
        group = self.shape["num_heads"] // heads
        apart = ops.reshape(whole, np.array([0, heads, 1, -1, width], np.int64), True)
        repeated = ops.multiply(apart, ops.constant(np.ones((1, 1, group, 1, 1), np.float32)))
        return ops.reshape(repeated, np.array([0, heads * group, -1, width], np.int64), True)

    def _graph(self) -> Any:
        ov, shape = self._openvino, self.shape
        from openvino import opset13 as ops

        hidden_size, head_dim = shape["hidden_size"], shape["head_dim"]
        embeds = ops.parameter([-1, -1, hidden_size], ov.Type.f32, name="embeds")
        cos = ops.parameter([1, 1, -1, head_dim], ov.Type.f32, name="cos")
        sin = ops.parameter([1, 1, -1, head_dim], ov.Type.f32, name="sin")
        mask = ops.parameter([1, 1, -1, -1], ov.Type.f32, name="mask")
        beam = ops.parameter([-1], ov.Type.i32, name="beam_idx")
        hidden = embeds
        sinks: list[Any] = []
        for layer in range(shape["layers"]):
            hidden = self._layer(hidden, layer, cos, sin, mask, beam, sinks)
        last = ops.slice(hidden, np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array([1]))
        logits = ops.result(self._linear(self._norm(last), hidden_size, shape["vocab_size"], 8), name="logits")
        return ov.Model([logits], sinks, [embeds, cos, sin, mask, beam], "decoder")

    def _layer(self, hidden: Any, layer: int, cos: Any, sin: Any, mask: Any, beam: Any, sinks: list[Any]) -> Any:
        from openvino import opset13 as ops

        shape = self.shape
        queries, keys = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]
        normed = self._norm(hidden)
        bias = ops.constant(np.full((1, 1, queries + 2 * keys), 0.1, np.float32))
        qkv = ops.add(self._linear(normed, shape["hidden_size"], queries + 2 * keys), bias)
        q, k, v = ops.variadic_split(qkv, np.int64(-1), np.array([queries, keys, keys], np.int64)).outputs()
        q = self._rotate(self._heads(q, shape["num_heads"]), cos, sin)
        k = self._rotate(self._heads(k, shape["num_kv_heads"]), cos, sin)
        k = self._cached(k, f"key.{layer}", beam, sinks)
        v = self._cached(self._heads(v, shape["num_kv_heads"]), f"value.{layer}", beam, sinks)
        mixed = ops.scaled_dot_product_attention(q, k, v, mask)
        mixed = ops.transpose(mixed, np.array([0, 2, 1, 3], np.int64))
        mixed = ops.reshape(mixed, np.array([0, 0, queries], np.int64), True)
        hidden = ops.add(hidden, self._linear(mixed, queries, shape["hidden_size"]))
        normed = self._norm(hidden)
        gate = ops.swish(self._linear(normed, shape["hidden_size"], shape["intermediate_size"]))
        up = self._linear(normed, shape["hidden_size"], shape["intermediate_size"])
        down = self._linear(ops.multiply(gate, up), shape["intermediate_size"], shape["hidden_size"])
        return ops.add(hidden, down)

    def fill(self, depth: int) -> None:
        """Make the cache hold `depth` tokens."""
        self._request.reset_state()
        self._filled = 0
        if depth:
            rows = (1, self.shape["num_kv_heads"], depth, self.shape["head_dim"])
            values = self._random.standard_normal(rows, np.float32)
            for state in self._request.query_state():
                state.state = self._openvino.Tensor(values)
        self._filled = depth

    def append(self, tokens: int) -> float:
        """Run `tokens` new tokens; returns milliseconds."""
        total = self._filled + tokens
        mask = np.zeros((1, 1, tokens, total), np.float32)
        mask[0, 0, :, self._filled :] = np.triu(np.full((tokens, tokens), -1e9, np.float32), 1)
        turned = np.arange(self._filled, total)[:, None] / 1e4 ** np.linspace(0, 1, self.shape["head_dim"] // 2)
        angles = np.concatenate([turned, turned], 1).astype(np.float32)[None, None]
        feeds = {
            "embeds": self._random.standard_normal((1, tokens, self.shape["hidden_size"]), np.float32),
            "cos": np.cos(angles),
            "sin": np.sin(angles),
            "mask": mask,
            "beam_idx": np.zeros(1, np.int32),
        }
        start = time.perf_counter()
        self._request.infer(feeds)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        self._filled = total
        return elapsed_ms

    def measure(self, tokens: int, depth: int) -> float:
        """Milliseconds of `tokens` new tokens behind `depth` cached ones; one append before it is not counted."""
        before = min(tokens, depth)
        self.fill(depth - before)
        if before:
            self.append(before)
        time.sleep(SETTLE_S)
        return self.append(tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("decoder", "products"))
    parser.add_argument("shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--kv", default="u8")
    args = parser.parse_args()
    import openvino

    shape = json.loads(args.shape)
    if args.what == "decoder":
        model: Any = Model(shape, args.threads, args.block, args.kv)
    else:
        model = Products(shape, args.threads, args.block)
    print(json.dumps({"ready": f"OpenVINO {openvino.__version__.split('-')[0]}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"ms": model.measure(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()

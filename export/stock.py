"""What the portable graphs are made of: standard ONNX operators, and one function built from ONNX Runtime's own.

Owns how a weight's stored precision becomes nodes, and how the caches and the frame's geometry come in. Knows no
model's layout (see `decoder` and `vision`). `native` replaces parts of it.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from edge import contract
from edge.contract import DecoderFacts, VisionFacts
from export.onnx_writer import GraphBuilder
from export.stream_attention import stream_attention_function


class StockOperators:
    """Adds the nodes of each layer to a graph."""

    vision_file = contract.VISION_FILE
    decoder_file = contract.DECODER_FILE

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder

    @staticmethod
    def functions(facts: DecoderFacts) -> list[onnx.FunctionProto]:
        """What a decoder's model file has to define."""
        return [stream_attention_function(facts)]

    # Layers ----------------------------------------------------------------------------------------------------

    def start(self, hidden: str, width: int) -> str:
        """The residual stream (rows, width) as the layers take it."""
        if not any(name.endswith(".scale") for name in self.builder.stored):
            return hidden
        # ONNX Runtime merges MatMul and residual Add into Gemm where their shapes are known to agree, and then no
        # longer sees a quantised MatMul. Behind this reshape, which copies nothing, the number of rows is unnamed.
        self.builder.scope("rows")
        return self.builder.op("Reshape", hidden, self.builder.constant([-1, width], "int64"))

    def dense(self, name: str) -> str:
        """A weight's values as float32."""
        weight = self.builder.weight(name)
        return weight if self.builder.stored[name].dtype == "float32" else self.builder.op("Cast", weight, to=1)

    def linear(
        self, values: str, name: str, *, bias: bool = False, residual: str | None = None, output: str | None = None
    ) -> str:
        """`values` (T, K) times the weight stored as `name`.weight (K, N), plus `name`.bias (N) and `residual` (T, N).

        A quantised weight has its scales (K / block, N) beside it as `name`.scale.
        """
        matrix = self._dequantized(name) if self.is_quantized(name) else self.dense(f"{name}.weight")
        sums = ([self.dense(f"{name}.bias")] if bias else []) + ([residual] if residual else [])
        result = self.builder.op("MatMul", values, matrix, output=None if sums else output)
        for i, addend in enumerate(sums, 1):
            result = self.builder.op("Add", addend, result, output=output if i == len(sums) else None)
        return result

    def is_quantized(self, name: str) -> bool:
        """Whether the weight `name` is stored as codes with scales."""
        return f"{name}.scale" in self.builder.stored

    def block_of(self, name: str) -> int:
        """Rows along K that share a scale in a quantised weight."""
        stored = self.builder.stored
        return stored[f"{name}.weight"].shape[0] // stored[f"{name}.scale"].shape[0]

    def _dequantized(self, name: str) -> str:
        inputs = (self.builder.weight(f"{name}.weight"), self.builder.weight(f"{name}.scale"))
        return self.builder.op("DequantizeLinear", *inputs, axis=0, block_size=self.block_of(name))

    def rms_norm(self, values: str, name: str, epsilon: float) -> str:
        """Root-mean-square norm over the last axis, in float32, times the weight `name`."""
        builder = self.builder
        square = builder.op("Pow", values, builder.constant(2.0, "float32"))
        mean = builder.op("ReduceMean", square, builder.constant([-1], "int64"), keepdims=1)
        deviation = builder.op("Sqrt", builder.op("Add", mean, builder.constant(epsilon, "float32")))
        return builder.op("Mul", builder.op("Div", values, deviation), self.dense(name))

    def gated_mlp(
        self, values: str, prefix: str, *, residual: str, bias: bool = False, output: str | None = None
    ) -> str:
        """SwiGLU: down(silu(gate(x)) * up(x)) + residual; gate and up are one weight, gate first."""
        activated = self._gated(values, f"{prefix}.gate_up", bias)
        return self.linear(activated, f"{prefix}.down", bias=bias, residual=residual, output=output)

    def _gated(self, values: str, name: str, bias: bool) -> str:
        width = self.builder.stored[f"{name}.weight"].shape[1] // 2
        both = self.linear(values, name, bias=bias)
        widths = self.builder.constant([width, width], "int64")
        gate, up = self.builder.node("Split", [both, widths], outputs=2, axis=1)
        silu = self.builder.op("Mul", gate, self.builder.op("Sigmoid", gate))
        return self.builder.op("Mul", silu, up)

    # Decoder ---------------------------------------------------------------------------------------------------

    def tied_head(self, values: str, *, output: str) -> None:
        """The unquantised head: it keeps the embedding table's layout (V, W), and a tied one shares its bytes."""
        self.builder.op("Gemm", values, self.dense("head.weight"), transB=1, output=output)

    def cache_inputs(self, facts: DecoderFacts, layers: range) -> None:
        """Declare what tells the attention of `layers` about the tokens before these."""
        self.builder.input(contract.CACHE_LENGTH, "int32", (1,))
        self._cache_tensors(facts, layers)

    def _cache_tensors(self, facts: DecoderFacts, layers: range) -> None:
        for name, dtype, shape in self.cache_tensors(facts, layers):
            self.builder.input(name, dtype, shape)

    def cache_tensors(self, facts: DecoderFacts, layers: range) -> list[tuple[str, str, tuple[int | str, ...]]]:
        """Name, dtype and shape of every tensor of the cache, in the graph's order."""
        shape = (1, facts.num_kv_heads, "C", facts.head_dim)
        names = [name for i in layers for name in (contract.key_cache_name(i), contract.value_cache_name(i))]
        return [(name, "float32", shape) for name in names]

    def cache_outputs(self, facts: DecoderFacts, layers: range) -> None:
        """Declare the updated caches."""
        for name, dtype, shape in self.cache_tensors(facts, layers):
            self.builder.output(contract.updated(name), dtype, shape)

    def attention(self, facts: DecoderFacts, layer: int, qkv: str) -> str:
        """Causal attention of the new tokens over the cache and themselves: qkv without bias to (T, Hq D)."""
        caches = [contract.key_cache_name(layer), contract.value_cache_name(layer)]
        inputs = [qkv, self.dense(f"layers.{layer}.qkv.bias"), contract.ROPE_COS, contract.ROPE_SIN, *caches]
        return self._attention_node(facts, layer, contract.STREAM_ATTENTION, [*inputs, contract.CACHE_LENGTH], caches)

    def _attention_node(
        self, facts: DecoderFacts, layer: int, op: str, inputs: list[str], caches: list[str], **attributes: int | str
    ) -> str:
        return self.builder.node(
            op,
            inputs,
            outputs=[f"layers.{layer}/attention", *map(contract.updated, caches)],
            domain=contract.CUSTOM_DOMAIN,
            num_heads=facts.num_heads,
            num_kv_heads=facts.num_kv_heads,
            scale=facts.head_dim**-0.5,
            **attributes,
        )[0]

    # Vision ----------------------------------------------------------------------------------------------------

    def window_inputs(self) -> None:
        """Declare what tells windowed attention which patches share a window."""
        self.builder.input(contract.WINDOW_MASK, "float32", ("P", "P"))

    def vision_attention(self, tower: VisionFacts, qkv: str, *, full: bool) -> str:
        """Attention among all patches or inside windows: qkv (P, 3 hidden) to (P, hidden)."""
        builder, heads, width = self.builder, tower.num_heads, tower.head_dim
        by_head = builder.op("Reshape", qkv, builder.constant([-1, 3 * heads, width], "int64"))
        split = builder.constant([2 * heads, heads], "int64")
        queries_keys, values = builder.node("Split", [by_head, split], outputs=2, axis=1)
        rotated = self._rotate(queries_keys, width // 2)
        split = builder.constant([heads, heads], "int64")
        queries, keys = builder.node("Split", [rotated, split], outputs=2, axis=1)
        queries = builder.op("Mul", queries, builder.constant(width**-0.5, "float32"))
        queries = builder.op("Transpose", queries, perm=[1, 0, 2])
        keys = builder.op("Transpose", keys, perm=[1, 2, 0])
        values = builder.op("Transpose", values, perm=[1, 0, 2])
        mixed = self._mixed(queries, keys, values, None if full else contract.WINDOW_MASK)
        mixed = builder.op("Transpose", mixed, perm=[1, 0, 2])
        return builder.op("Reshape", mixed, builder.constant([-1, heads * width], "int64"))

    def _mixed(self, queries: str, keys: str, values: str, mask: str | None) -> str:
        """Softmax of the scores, plus `mask` (P, P), times the values: (heads, P, D)."""
        scores = self.builder.op("MatMul", queries, keys)
        if mask:
            scores = self.builder.op("Add", scores, mask)
        return self.builder.op("MatMul", self.builder.op("Softmax", scores, axis=-1), values)

    def _rotate(self, values: str, half: int) -> str:
        """Rotate (P, heads, D); element i pairs with element i + D / 2."""
        builder, axis = self.builder, self.builder.constant([1], "int64")
        cos = builder.op("Unsqueeze", contract.VISION_COS, axis)
        sin = builder.op("Unsqueeze", contract.VISION_SIN, axis)
        widths = builder.constant([half, half], "int64")
        first, second = builder.node("Split", [values, widths], outputs=2, axis=2)
        turned_first = builder.op("Sub", builder.op("Mul", first, cos), builder.op("Mul", second, sin))
        turned_second = builder.op("Add", builder.op("Mul", second, cos), builder.op("Mul", first, sin))
        return builder.op("Concat", turned_first, turned_second, axis=2)


Operators = Callable[[GraphBuilder], StockOperators]
"""What a graph's layers are made of: `StockOperators`, or those of `native`."""

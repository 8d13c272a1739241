"""ONNX Runtime's own operators as graphs of one kind of node, to be timed beside ours.

Owns the graphs and their bound memory. Needs `onnx` to write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge.errors import UsageError

IR_VERSION, OPSET = 10, 21


def onnx_modules() -> Any:
    """The package `onnx`.

    Raises:
      UsageError: it is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise UsageError(
            "This benchmark writes graphs of stock operators, which needs the package `onnx`; it is not installed",
            hint="pip install 'streamo-edge[demo]'",
        ) from None
    return onnx


def session(model: Any, threads: int, external: dict[str, np.ndarray] | None = None) -> Any:
    """The model in ONNX Runtime; `external` gives the initializers that it does not carry itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    if external:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in external.values()]
        options.add_external_initializers(list(external), values)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()) -> Any:
    helper = onnx_modules().helper
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(list(nodes), "stock", list(inputs), list(outputs), list(weights))
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _info(name: str, dtype: Any, shape: Sequence[int]) -> Any:
    onnx = onnx_modules()
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))


def _bind(bind: Any, name: str, array: np.ndarray) -> None:
    """Give `array`'s memory to `bind_input` or `bind_output` of a binding."""
    bind(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)


class GroupQueryAttention:
    """The stock attention of T new tokens behind `depth` cached ones, over several layers' caches in place.

    Queries and keys come in already turned and with their bias, which ours does by itself.

    Args:
      quantised: "" for float32 caches; "PER_CHANNEL" or "PER_TENSOR" for int8.
    """

    def __init__(
        self, heads: tuple[int, int, int], tokens: int, depth: int, layers: int, threads: int, quantised: str = ""
    ) -> None:
        self._heads, self._tokens = heads, tokens
        query_heads, kv_heads, width = heads
        self._dtype = np.dtype(np.int8 if quantised else np.float32)
        random = np.random.default_rng(11)
        new = [random.standard_normal((1, tokens, count * width), np.float32) for count in (query_heads, kv_heads)]
        self._feeds: dict[str, np.ndarray] = {"query": new[0], "key": new[1], "value": new[1].copy()}
        self._feeds["last"] = np.array([depth + tokens - 1], np.int32)
        self._feeds["total"] = np.array(depth + tokens, np.int32)
        if quantised:
            shape = (1, kv_heads, 1, width) if quantised == "PER_CHANNEL" else (1,)
            self._feeds |= {name: np.full(shape, 0.02, np.float32) for name in ("key_scale", "value_scale")}
        shape = (1, kv_heads, depth + tokens, width)
        self._caches = [random_cache(shape, self._dtype, layer) for layer in range(2 * layers)]
        self._session = session(self._graph(quantised), threads)
        self._output = np.empty((1, tokens, query_heads * width), np.float32)
        self._bindings = [self._binding(layer) for layer in range(layers)]

    def _graph(self, quantised: str) -> Any:
        names = ["query", "key", "value", "past_key", "past_value", "last", "total"]
        attributes: dict[str, Any] = {}
        if quantised:
            names += [""] * 5 + ["key_scale", "value_scale"]
            attributes = {"k_quant_type": quantised, "v_quant_type": quantised, "kv_cache_bit_width": 8}
        outputs = ["output", "present_key", "present_value"]
        helper = onnx_modules().helper
        node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft",
                                num_heads=self._heads[0], kv_num_heads=self._heads[1], **attributes)  # fmt: skip
        cache = self._caches[0].shape
        inputs = [_info(name, array.dtype, array.shape) for name, array in self._feeds.items()]
        inputs += [_info(name, self._dtype, cache) for name in ("past_key", "past_value")]
        output = (1, self._tokens, self._heads[0] * self._heads[2])
        infos = [_info("output", np.float32, output), *(_info(name, self._dtype, cache) for name in outputs[1:])]
        return _model([node], inputs, infos)

    def _binding(self, layer: int) -> Any:
        binding = self._session.io_binding()
        key, value = self._caches[2 * layer : 2 * layer + 2]
        for name, array in {**self._feeds, "past_key": key, "past_value": value}.items():
            _bind(binding.bind_input, name, array)
        for name, array in {"output": self._output, "present_key": key, "present_value": value}.items():
            _bind(binding.bind_output, name, array)
        return binding

    def run(self) -> None:
        """One call for each layer."""
        for binding in self._bindings:
            self._session.run_with_iobinding(binding)


def random_cache(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Contents of a cache, made quickly: one random piece again and again."""
    random = np.random.default_rng(seed)
    if dtype == np.int8:
        piece = random.integers(-127, 128, 1 << 20, np.int8)
    else:
        piece = random.standard_normal(1 << 18, np.float32).astype(dtype)
    cache = np.empty(shape, dtype)
    flat = cache.reshape(-1)
    for start in range(0, len(flat), len(piece)):
        flat[start : start + len(piece)] = piece[: len(flat) - start]
    return cache


class MatMulNBits:
    """The stock product with several quantised weights, one node each in one graph.

    Args:
      inputs, outputs: K and N. weights: how many different ones.
    """

    def __init__(self, inputs: int, outputs: int, rows: int, bits: int, block: int, weights: int, threads: int) -> None:
        onnx = onnx_modules()
        helper, types = onnx.helper, onnx.TensorProto
        random = np.random.default_rng(12)
        external: dict[str, np.ndarray] = {}
        nodes, tensors, infos = [], [], []
        for i in range(weights):
            content = random.bytes(inputs * outputs * bits // 8)
            codes = np.frombuffer(content, np.uint8).reshape(outputs, inputs // block, block * bits // 8)
            scales = random.random(outputs * inputs // block, np.float32) * np.float32(0.01)
            for name, array, kind in ((f"codes.{i}", codes, types.UINT8), (f"scales.{i}", scales, types.FLOAT)):
                tensor = types(name=name, data_type=kind, dims=array.shape, data_location=types.EXTERNAL)
                tensor.external_data.add(key="location", value="given")
                tensor.external_data.add(key="length", value=str(array.nbytes))
                tensors.append(tensor)
                external[name] = array
            names = (["input", f"codes.{i}", f"scales.{i}"], [f"output.{i}"])
            nodes.append(helper.make_node("MatMulNBits", *names, domain="com.microsoft", K=inputs, N=outputs,
                                          bits=bits, block_size=block, accuracy_level=4))  # fmt: skip
            infos.append(_info(f"output.{i}", np.float32, (rows, outputs)))
        model = _model(nodes, [_info("input", np.float32, (rows, inputs))], infos, tensors)
        self._session = session(model, threads, external)
        self._binding = self._session.io_binding()
        self._input = random.standard_normal((rows, inputs), np.float32)
        self._output = np.empty((rows, outputs), np.float32)
        _bind(self._binding.bind_input, "input", self._input)
        for i in range(weights):
            _bind(self._binding.bind_output, f"output.{i}", self._output)

    def run(self) -> None:
        """One product with each weight."""
        self._session.run_with_iobinding(self._binding)

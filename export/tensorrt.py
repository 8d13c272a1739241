"""What the TensorRT graphs are made of: TensorRT's own layers in float16, and the operators of our plugin library.

Owns precisions. TensorRT takes types as the graph says them (strong typing). Qwen2.5 does not fit into float16
everywhere, so only what goes into a matrix product is float16:

- The residual stream, the norms, biases, rotation, softmax and SwiGLU are float32. The stream reaches tens of thousands
  in a few channels, and the sum of two numbers that fit need not fit.
- A product's input is a norm's output or a mean of values, which are small; its result is float16 too, and goes back
  to float32 before anything is added.
- The input of `down`, a product of two activations, is the one that overflows. Each row is divided by what brings its
  largest value to `LARGEST_INPUT`, and the result multiplied again: with weights whose columns sum to less than
  65504 / `LARGEST_INPUT` = 1023 in magnitude nothing can overflow, whatever the row.

Quantised weights: 4 bits in blocks of 64 or 128 are TensorRT's own weight-only product, a `DequantizeLinear` with
float16 scales in front of the `MatMul`. TensorRT has none for other blocks, and 10.3 none for blocks of 8 bits; the
plugin takes those as they are. Weights are the stock graph's bytes; only the float16 scales are written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge import contract
from edge.contract import DecoderFacts, VisionFacts
from export.native import NativeOperators, key_offset_name
from export.onnx_writer import ELEMENT_TYPES
from export.stock import StockOperators
from export.weight_store import StoredTensor, WeightFile

HALF, FLOAT = ELEMENT_TYPES["float16"], ELEMENT_TYPES["float32"]
LARGEST_INPUT = 64.0
"""What a row of `down`'s input is brought to before it becomes float16."""
SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65504.0
PLUGIN = {"plugin_namespace": contract.PLUGIN_NAMESPACE, "plugin_version": contract.PLUGIN_VERSION}


def half_scale_name(name: str) -> str:
    """The stored float16 scales of the weight `name`."""
    return f"{name}.half_scale"


def has_own_product(stored: Mapping[str, StoredTensor], name: str) -> bool:
    """Whether TensorRT multiplies with the quantised weight `name` itself."""
    weight, scale = stored[f"{name}.weight"], stored[f"{name}.scale"]
    block, rest = divmod(weight.shape[0], scale.shape[0])
    return weight.dtype == "int4" and not rest and block in contract.TENSORRT_INT4_BLOCKS


def any_half_scales(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether `write_half_scales` would write anything."""
    return bool(_own_products(stored))


def _own_products(stored: Mapping[str, StoredTensor]) -> list[str]:
    quantised = [key.removesuffix(".scale") for key in stored if key.endswith(".scale")]
    return [name for name in quantised if has_own_product(stored, name)]


def write_half_scales(folder: Path, stored: Mapping[str, StoredTensor], file: WeightFile) -> dict[str, StoredTensor]:
    """Append the float16 scales of every weight that TensorRT multiplies with itself; returns where they lie."""
    written = {}
    for name in _own_products(stored):
        scale = stored[f"{name}.scale"]
        values = np.memmap(folder / scale.file, np.float32, "r", scale.offset, scale.shape)
        half = np.clip(values, SMALLEST_HALF, LARGEST_HALF).astype(np.float16)  # TensorRT wants them above 0
        written[half_scale_name(name)] = file.append("float16", scale.shape, [half])
    return written


class TensorRTOperators(NativeOperators):
    """Adds the nodes of each layer to a graph. Values between layers are float32.

    Args:
      kv_dtypes: of each layer's cache, float32 or int8.
    """

    vision_file = contract.TENSORRT_VISION_FILE
    decoder_file = contract.TENSORRT_DECODER_FILE

    # Layers ----------------------------------------------------------------------------------------------------

    def rms_norm(self, values: str, name: str, epsilon: float) -> str:
        return StockOperators.rms_norm(self, values, name, epsilon)

    def linear(
        self, values: str, name: str, *, bias: bool = False, residual: str | None = None, output: str | None = None
    ) -> str:
        if self._needs_plugin(name):
            return self._matmul(values, name, bias, residual or "", output=output)
        return self._sum(self._product(values, name), name, bias, residual, output)

    def gated_mlp(
        self, values: str, prefix: str, *, residual: str, bias: bool = False, output: str | None = None
    ) -> str:
        activated, down = self._gated(values, f"{prefix}.gate_up", bias), f"{prefix}.down"
        if self._needs_plugin(down):
            return self.linear(activated, down, bias=bias, residual=residual, output=output)
        builder = self.builder
        largest = builder.op("ReduceMax", builder.op("Abs", activated), builder.constant([-1], "int64"), keepdims=1)
        ratio = builder.op("Div", largest, builder.constant(LARGEST_INPUT, "float32"))
        divisor = builder.op("Max", ratio, builder.constant(1.0, "float32"))
        product = builder.op("Mul", self._product(builder.op("Div", activated, divisor), down), divisor)
        return self._sum(product, down, bias, residual, output)

    def _gated(self, values: str, name: str, bias: bool) -> str:
        if self._needs_plugin(name):
            return self._matmul(values, name, bias, gated=True)
        return StockOperators._gated(self, values, name, bias)

    def _needs_plugin(self, name: str) -> bool:
        return self.is_quantized(name) and not has_own_product(self.builder.stored, name)

    def _product(self, values: str, name: str) -> str:
        """(T, K) float32 times the weight, in float16, to float32."""
        product = self.builder.op("MatMul", self._half(values), self._matrix(name))
        return self.builder.op("Cast", product, to=FLOAT)

    def _matrix(self, name: str) -> str:
        """The weight's values (K, N) in float16."""
        if not self.is_quantized(name):
            return self._dense_half(f"{name}.weight")
        inputs = (self.builder.weight(f"{name}.weight"), self.builder.weight(half_scale_name(name)))
        return self.builder.op("DequantizeLinear", *inputs, axis=0, block_size=self.block_of(name))

    def _dense_half(self, name: str) -> str:
        weight = self.builder.weight(name)
        return weight if self.builder.stored[name].dtype == "float16" else self._half(weight)

    def _half(self, values: str) -> str:
        return self.builder.op("Cast", values, to=HALF)

    def _sum(self, result: str, name: str, bias: bool, residual: str | None, output: str | None) -> str:
        addends = ([self.dense(f"{name}.bias")] if bias else []) + ([residual] if residual else [])
        for i, addend in enumerate(addends, 1):
            result = self.builder.op("Add", addend, result, output=output if i == len(addends) else None)
        return result if addends or not output else self.builder.op("Identity", result, output=output)

    def _matmul(
        self, values: str, name: str, bias: bool, residual: str = "", *, gated: bool = False, output: str | None = None
    ) -> str:
        inputs = [values, self.builder.weight_words_of(f"{name}.weight"), self.builder.weight(f"{name}.scale")]
        inputs += [self.dense(f"{name}.bias")] if bias else []
        inputs += [residual] if residual else []
        addends = {"bias": int(bias), "residual": int(bool(residual))}
        return self._product_node(name, contract.PLUGIN_MATMUL, inputs, gated=gated, output=output, **addends, **PLUGIN)

    # Decoder ---------------------------------------------------------------------------------------------------

    def tied_head(self, values: str, *, output: str) -> None:
        logits = self.builder.op("Gemm", self._half(values), self._dense_half("head.weight"), transB=1)
        self.builder.op("Cast", logits, to=FLOAT, output=output)

    def cache_inputs(self, facts: DecoderFacts, layers: range) -> None:
        half = facts.head_dim // 2
        self.builder.input(contract.ATTENTION_TABLE, "int32", ("words",))
        self.builder.input(contract.RUN_COS, "float32", ("R", half))
        self.builder.input(contract.RUN_SIN, "float32", ("R", half))
        self._cache_tensors(facts, layers)
        self._slot_inputs(half, layers)

    def cache_tensors(self, facts: DecoderFacts, layers: range) -> list[tuple[str, str, tuple[int | str, ...]]]:
        tensors = super().cache_tensors(facts, layers)
        return [
            (name, "int32", (*shape[:-1], facts.head_dim // 4)) if dtype == "int8" else (name, dtype, shape)
            for name, dtype, shape in tensors
        ]

    def attention(self, facts: DecoderFacts, layer: int, qkv: str) -> str:
        names = [name for name, _, _ in self.cache_tensors(facts, range(layer, layer + 1))]
        tables = [contract.ATTENTION_TABLE, contract.RUN_COS, contract.RUN_SIN]
        bias = self.dense(f"layers.{layer}.qkv.bias")
        inputs = [qkv, bias, contract.ROPE_COS, contract.ROPE_SIN, *names[:2], *tables, *names[2:]]
        has_offset = key_offset_name(layer) in self.builder.stored
        if has_offset:
            inputs += [self.builder.weight(key_offset_name(layer)), contract.SLOT_COS, contract.SLOT_SIN]
        return self._attention_node(
            facts,
            layer,
            contract.TABLE_ATTENTION,
            inputs,
            names,
            int8_cache=int(self._kv_dtypes[layer] == "int8"),
            key_offset=int(has_offset),
            most_spans=contract.MOST_SPANS,
            **PLUGIN,
        )

    # Vision ----------------------------------------------------------------------------------------------------

    def window_inputs(self) -> None:
        StockOperators.window_inputs(self)

    def vision_attention(self, tower: VisionFacts, qkv: str, *, full: bool) -> str:
        return StockOperators.vision_attention(self, tower, qkv, full=full)

    def _mixed(self, queries: str, keys: str, values: str, mask: str | None) -> str:
        scores = self.builder.op("MatMul", self._half(queries), self._half(keys))
        scores = self.builder.op("Cast", scores, to=FLOAT)
        weights = self.builder.op("Softmax", self.builder.op("Add", scores, mask) if mask else scores, axis=-1)
        mixed = self.builder.op("MatMul", self._half(weights), self._half(values))
        return self.builder.op("Cast", mixed, to=FLOAT)

"""What the native graphs are made of: the operators of the library built from `kernels/`, where they cover a layer.

Owns which nodes they replace. Everything else is as in the stock graph, over the same bytes of weights.
"""

from __future__ import annotations

from functools import partial

import onnx

from edge import contract
from edge.contract import DecoderFacts, VisionFacts
from export.config import ModelFacts
from export.onnx_writer import GraphBuilder
from export.stock import Operators, StockOperators

HEAD_DIM_MULTIPLE = 16
LARGEST_HEAD_DIM = 256
BITS = {"int8": 8, "int4": 4}


def key_offset_name(layer: int) -> str:
    """The stored weight that is taken off layer `layer`'s keys before they are quantised."""
    return f"layers.{layer}.key_offset"


def unsupported(facts: ModelFacts) -> str:
    """Why the native operators do not cover a model; "" if they do."""
    for what, head_dim in (("decoder", facts.decoder.head_dim), ("vision tower", facts.vision.head_dim)):
        if head_dim % HEAD_DIM_MULTIPLE or head_dim > LARGEST_HEAD_DIM:
            return f"heads of the {what} are {head_dim} wide, not a multiple of 16 up to {LARGEST_HEAD_DIM}"
    return ""


class NativeOperators(StockOperators):
    """Adds the nodes of each layer to a graph.

    Args:
      kv_dtypes: of each layer's cache, float32 or int8.
    """

    vision_file = contract.NATIVE_VISION_FILE
    decoder_file = contract.NATIVE_DECODER_FILE

    def __init__(self, builder: GraphBuilder, kv_dtypes: tuple[str, ...] = ()) -> None:
        super().__init__(builder)
        self._kv_dtypes = kv_dtypes

    @classmethod
    def of(cls, kv_dtypes: tuple[str, ...]) -> Operators:
        """The operators of graphs with these caches."""
        return partial(cls, kv_dtypes=kv_dtypes)

    @staticmethod
    def functions(facts: DecoderFacts) -> list[onnx.FunctionProto]:
        return []

    def start(self, hidden: str, width: int) -> str:
        return hidden

    def rms_norm(self, values: str, name: str, epsilon: float) -> str:
        norm = "SimplifiedLayerNormalization"  # ONNX Runtime's own, though it lives in the standard domain
        return self.builder.op(norm, values, self.dense(name), axis=-1, epsilon=epsilon, stash_type=1)

    def linear(
        self, values: str, name: str, *, bias: bool = False, residual: str | None = None, output: str | None = None
    ) -> str:
        if not self.is_quantized(name):
            return super().linear(values, name, bias=bias, residual=residual, output=output)
        return self._matmul(values, name, bias, residual or "", output=output)

    def _gated(self, values: str, name: str, bias: bool) -> str:
        if not self.is_quantized(name):
            return super()._gated(values, name, bias)
        return self._matmul(values, name, bias, gated=True)

    def _matmul(
        self, values: str, name: str, bias: bool, residual: str = "", *, gated: bool = False, output: str | None = None
    ) -> str:
        inputs = [values, self.builder.weight_bytes_of(f"{name}.weight"), self.builder.weight(f"{name}.scale")]
        inputs += [self.dense(f"{name}.bias") if bias else "", residual]
        while not inputs[-1]:
            inputs.pop()
        return self._product_node(name, contract.STREAM_MATMUL, inputs, gated=gated, output=output)

    def _product_node(
        self, name: str, op: str, inputs: list[str], *, gated: bool, output: str | None, **more: int | str
    ) -> str:
        """An operator that multiplies with a quantised weight."""
        return self.builder.op(
            op,
            *inputs,
            output=output,
            domain=contract.CUSTOM_DOMAIN,
            bits=BITS[self.builder.stored[f"{name}.weight"].dtype],
            block_size=self.block_of(name),
            gated=int(gated),
            **more,
        )

    # Decoder ---------------------------------------------------------------------------------------------------

    def cache_inputs(self, facts: DecoderFacts, layers: range) -> None:
        half = facts.head_dim // 2
        self.builder.input(contract.NEW_SLOTS, "int32", ("T",))
        self.builder.input(contract.SPANS, "int32", ("S", 3))
        self.builder.input(contract.RUN_COS, "float32", ("R", half))
        self.builder.input(contract.RUN_SIN, "float32", ("R", half))
        self._cache_tensors(facts, layers)
        self._slot_inputs(half, layers)

    def _slot_inputs(self, half: int, layers: range) -> None:
        """Declare the angles of every row, where a layer needs them to put its offset back."""
        if any(key_offset_name(layer) in self.builder.stored for layer in layers):
            self.builder.input(contract.SLOT_COS, "float32", ("C", half))
            self.builder.input(contract.SLOT_SIN, "float32", ("C", half))

    def cache_tensors(self, facts: DecoderFacts, layers: range) -> list[tuple[str, str, tuple[int | str, ...]]]:
        rows: tuple[int | str, ...] = (1, facts.num_kv_heads, "C")
        tensors: list[tuple[str, str, tuple[int | str, ...]]] = []
        for layer in layers:
            dtype = self._kv_dtypes[layer]
            for name in (contract.key_cache_name(layer), contract.value_cache_name(layer)):
                tensors.append((name, dtype, (*rows, facts.head_dim)))
            if dtype == "int8":
                for name in (contract.key_scales_name(layer), contract.value_scales_name(layer)):
                    tensors.append((name, "float32", rows))
        return tensors

    def attention(self, facts: DecoderFacts, layer: int, qkv: str) -> str:
        names = [name for name, _, _ in self.cache_tensors(facts, range(layer, layer + 1))]
        tables = [contract.NEW_SLOTS, contract.SPANS, contract.RUN_COS, contract.RUN_SIN]
        bias = self.dense(f"layers.{layer}.qkv.bias")
        inputs = [qkv, bias, contract.ROPE_COS, contract.ROPE_SIN, *names[:2], *tables, *names[2:]]
        if key_offset_name(layer) in self.builder.stored:
            inputs += [self.builder.weight(key_offset_name(layer)), contract.SLOT_COS, contract.SLOT_SIN]
        op = contract.SPAN_ATTENTION_INT8 if self._kv_dtypes[layer] == "int8" else contract.SPAN_ATTENTION
        return self._attention_node(facts, layer, op, inputs, names)

    # Vision ----------------------------------------------------------------------------------------------------

    def window_inputs(self) -> None:
        self.builder.input(contract.WINDOW_STARTS, "int32", ("windows_and_one",))

    def vision_attention(self, tower: VisionFacts, qkv: str, *, full: bool) -> str:
        return self.builder.op(
            contract.WINDOW_ATTENTION,
            qkv,
            contract.VISION_COS,
            contract.VISION_SIN,
            self._one_window() if full else contract.WINDOW_STARTS,
            domain=contract.CUSTOM_DOMAIN,
            num_heads=tower.num_heads,
            scale=tower.head_dim**-0.5,
        )

    def _one_window(self) -> str:
        """The starts of a window around all patches: (2,) int32, 0 and P."""
        builder = self.builder
        rows = builder.op("Cast", builder.op("Shape", contract.VISION_COS, start=0, end=1), to=6)
        return builder.op("Concat", builder.constant([0], "int32"), rows, axis=0)

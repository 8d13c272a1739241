"""The plugin operators of the TensorRT graphs in numpy, and the graphs in onnx's own evaluator.

The table of an attention step is the GPU kernels' own format there; here it is `table_of`'s, which only this reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from native_operators import StreamMatMul, span_attention
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edge import contract
from export.graph_kinds import Feeds, NativeGraphs, StockGraphs, Tables
from export.tensorrt import TensorRTOperators


def table_of(new_slots: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """(words,) int32: how many new slots and spans, and they themselves."""
    return np.concatenate([[len(new_slots), len(spans)], new_slots, spans.reshape(-1)]).astype(np.int32)


class StreamoTableAttention(OpRun):
    op_domain = contract.CUSTOM_DOMAIN

    def _run(self, *inputs: Any, num_heads: int, num_kv_heads: int, scale: float, int8_cache: int, key_offset: int,
             most_spans: int, plugin_namespace: str, plugin_version: str) -> tuple[np.ndarray, ...]:  # fmt: skip
        assert (plugin_namespace, plugin_version) == (contract.PLUGIN_NAMESPACE, contract.PLUGIN_VERSION)
        assert len(inputs) == 9 + 2 * int8_cache + 3 * key_offset
        (count, span_count), rest = inputs[6][:2], inputs[6][2:]
        new_slots, spans = rest[:count], rest[count : count + 3 * span_count].reshape(-1, 3)
        assert len(spans) <= most_spans
        caches = [cache[0].copy() for cache in (*inputs[4:6], *inputs[9 : 9 + 2 * int8_cache])]
        if int8_cache:
            caches[:2] = [cache.view(np.int8) for cache in caches[:2]]
        offset, slot_cos, slot_sin = inputs[-3:] if key_offset else (None, None, None)
        found = span_attention(
            *inputs[:4], caches, new_slots, spans, *inputs[7:9], query_heads=num_heads, scale=scale,
            key_offset=offset, slot_cos=slot_cos, slot_sin=slot_sin,
        )  # fmt: skip
        assert caches[0].shape[0] == num_kv_heads
        words = [cache.view(np.int32) if cache.dtype == np.int8 else cache for cache in caches]
        return found.astype(np.float32), *(cache[None] for cache in words)


class StreamoMatMul(OpRun):
    op_domain = contract.CUSTOM_DOMAIN

    def _run(self, values: Any, words: Any, scales: Any, *rest: Any, bits: int, block_size: int, gated: int, bias: int,
             residual: int, plugin_namespace: str, plugin_version: str) -> tuple[np.ndarray]:  # fmt: skip
        assert (plugin_namespace, plugin_version) == (contract.PLUGIN_NAMESPACE, contract.PLUGIN_VERSION)
        assert words.dtype == np.int32 and len(rest) == bias + residual
        given = list(rest)
        addends = [given.pop(0) if wanted else None for wanted in (bias, residual)]
        return StreamMatMul._run(
            self, values, words.view(np.uint8), scales, *addends, bits=bits, block_size=block_size, gated=gated
        )


def tensorrt_graph(path: Path) -> ReferenceEvaluator:
    """A TensorRT graph in onnx's own evaluator; `run(None, feeds)` gives its outputs in order."""
    return ReferenceEvaluator(onnx.load(str(path)), new_ops=[StreamoTableAttention, StreamoMatMul])


class TensorRTGraphs(NativeGraphs):
    """What the TensorRT graphs take for a conversation that only grows."""

    vision_file = contract.TENSORRT_VISION_FILE
    decoder_file = contract.TENSORRT_DECODER_FILE
    frame = StockGraphs.frame

    def __init__(self, kv_dtypes: tuple[str, ...]) -> None:
        super().__init__("", kv_dtypes)
        self.operators = TensorRTOperators.of(kv_dtypes)

    def append(self, tables: list[Tables], index: int) -> Feeds:
        feeds = super().append(tables, index)
        table = table_of(feeds.pop(contract.NEW_SLOTS), feeds.pop(contract.SPANS))
        return {**feeds, contract.ATTENTION_TABLE: table}

"""The operators of the native graphs in numpy, as `kernels/include/streamo_kernels.h` describes them.

A second opinion beside the library's own oracle, and a way to run native graphs where the library is not built.
Arithmetic is in double except where a cache is quantised, and inputs of products are not quantised.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from kernel_cases import softmax
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from apps.bench.kernel_cases import quantise_rows, rotate
from edge.contract import CUSTOM_DOMAIN


def span_attention(
    qkv: np.ndarray,
    bias: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    caches: list[np.ndarray],
    new_slots: np.ndarray,
    spans: np.ndarray,
    run_cos: np.ndarray,
    run_sin: np.ndarray,
    *,
    query_heads: int,
    scale: float,
    key_offset: np.ndarray | None = None,
    slot_cos: np.ndarray | None = None,
    slot_sin: np.ndarray | None = None,
) -> np.ndarray:
    """Append T tokens and attend. See `streamo_attention` in the header.

    Args:
      caches: keys and values (Hkv, C, D), and for int8 their scales (Hkv, C); changed in place.

    Returns:
      (T, Hq D) float64.
    """
    kv_heads, _, width = caches[0].shape
    int8 = len(caches) == 4
    heads = (qkv + 0.0).reshape(len(qkv), -1, width).astype(np.float64).transpose(1, 0, 2)
    biases = bias.reshape(-1, 1, width).astype(np.float64)
    first_value = query_heads + kv_heads
    queries = rotate((heads + biases)[:query_heads], cos, sin)
    offset = np.zeros((kv_heads, 1, width)) if key_offset is None else key_offset[:, None].astype(np.float64)
    keys = rotate(heads[query_heads:first_value] + biases[query_heads:first_value] - offset, cos, sin)
    values = heads[first_value:] + (0 if int8 else biases[first_value:])
    for cache, rows in ((0, keys), (1, values)):
        if int8:
            caches[cache][:, new_slots], caches[cache + 2][:, new_slots] = quantise_rows(rows)
        else:
            caches[cache][:, new_slots] = rows
    slots = np.concatenate([*(np.arange(s, s + n) for s, n, _ in spans), new_slots]).astype(int)
    runs = np.concatenate([*(np.full(n, r) for _, n, r in spans), np.full(len(new_slots), -1)]).astype(int)
    keys, values = (cache[:, slots].astype(np.float64) for cache in caches[:2])
    if int8:
        keys, values = keys * caches[2][:, slots, None], values * caches[3][:, slots, None]
        if key_offset is not None:
            keys = keys + rotate(np.broadcast_to(offset, keys.shape), slot_cos[slots], slot_sin[slots])
    group = query_heads // kv_heads
    keys, values = np.repeat(keys, group, axis=0), np.repeat(values, group, axis=0)
    scores = np.empty((query_heads, len(qkv), len(slots)))
    for run in np.unique(runs):
        turned = queries if run < 0 else rotate(queries, run_cos[run], run_sin[run])
        scores[:, :, runs == run] = turned @ keys[:, runs == run].transpose(0, 2, 1) * scale
    later = np.triu(np.ones((len(qkv), len(new_slots)), bool), 1)
    scores[:, :, len(slots) - len(new_slots) :][:, later] = -np.inf
    mixed = softmax(scores) @ values
    if int8:
        mixed += np.repeat(biases[first_value:], group, axis=0)
    return mixed.transpose(1, 0, 2).reshape(len(qkv), -1)


class SpanAttention(OpRun):
    op_domain = CUSTOM_DOMAIN

    def _run(self, *inputs: Any, num_heads: int, num_kv_heads: int, scale: float) -> tuple[np.ndarray, ...]:
        caches = [inputs[i][0].copy() for i in (4, 5, *range(10, min(len(inputs), 12)))]
        offset, slot_cos, slot_sin = inputs[12:15] if len(inputs) > 12 else (None, None, None)
        found = span_attention(
            *inputs[:4], caches, *inputs[6:10], query_heads=num_heads, scale=scale,
            key_offset=offset, slot_cos=slot_cos, slot_sin=slot_sin,
        )  # fmt: skip
        return found.astype(np.float32), *(cache[None] for cache in caches)


class SpanAttentionInt8(SpanAttention):
    op_domain = CUSTOM_DOMAIN


class StreamMatMul(OpRun):
    op_domain = CUSTOM_DOMAIN

    def _run(self, values: Any, codes: Any, scales: Any, bias: Any = None, residual: Any = None, *, bits: int,
             block_size: int, gated: int) -> tuple[np.ndarray]:  # fmt: skip
        if bits == 4:
            halves = np.stack([(codes << 4).view(np.int8) >> 4, codes.view(np.int8) >> 4], axis=-1)
            codes = halves.reshape(-1)
        codes = codes.view(np.int8).reshape(-1, scales.shape[1])
        assert codes.shape[0] == values.shape[1] == scales.shape[0] * block_size
        result = values.astype(np.float64) @ (codes * np.repeat(scales.astype(np.float64), block_size, axis=0))
        result = result if bias is None else result + bias
        if gated:
            gate, up = np.split(result, 2, axis=1)
            result = gate / (1 + np.exp(-gate)) * up
        return (np.asarray(result if residual is None else result + residual, np.float32),)


class WindowAttention(OpRun):
    op_domain = CUSTOM_DOMAIN

    def _run(self, qkv: Any, cos: Any, sin: Any, starts: Any, *, num_heads: int, scale: float) -> tuple[np.ndarray]:
        heads = qkv.astype(np.float64).reshape(len(qkv), 3, num_heads, -1).transpose(1, 2, 0, 3)
        queries, keys = rotate(heads[0], cos, sin), rotate(heads[1], cos, sin)
        result = np.empty_like(queries)
        assert starts[0] == 0 and starts[-1] == len(qkv)
        for first, last in itertools.pairwise(starts):
            scores = queries[:, first:last] @ keys[:, first:last].transpose(0, 2, 1) * scale
            result[:, first:last] = softmax(scores) @ heads[2][:, first:last]
        return (result.transpose(1, 0, 2).reshape(len(qkv), -1).astype(np.float32),)


class SimplifiedLayerNormalization(OpRun):
    def _run(self, values: Any, weight: Any, *, axis: int, epsilon: float, stash_type: int) -> tuple[np.ndarray]:
        mean = np.square(values.astype(np.float64)).mean(axis=axis, keepdims=True)
        return ((values / np.sqrt(mean + epsilon) * weight).astype(np.float32),)


def native_graph(path: Path) -> ReferenceEvaluator:
    """A native graph in onnx's own evaluator; `run(None, feeds)` gives its outputs in order."""
    own = [SpanAttention, SpanAttentionInt8, StreamMatMul, WindowAttention, SimplifiedLayerNormalization]
    return ReferenceEvaluator(onnx.load(str(path)), new_ops=own)

"""What each layer's KV cache becomes, from the layer's own keys and values on real turns.

Owns the measure and the rule. Rounding follows the kernels: int8 rows with one float32 scale for each token and head,
the offset taken off in front of the rotation and added back exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.contract import DecoderFacts, LayerCache
from export.float_layers import rotate, softmax, split_heads
from export.key_offset import LARGEST_RATIO, pair_norms
from export.plan import AUTO

QUERIES = 64
"""Queries of each conversation that attend, spread evenly."""
OFFSET_ABOVE = 0.03
"""Relative error of a layer's attention from which an offset is worth its time."""
FLOAT_ABOVE = 0.1
"""Relative error that no layer's cache may have; such a layer keeps float32."""
CLEARLY = 0.8
"""A measured offset replaces that of the bias where its error is below this part of the other's."""
NONE, BIAS, MEAN = "none", "bias", "mean"

Tables = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LayerKeys:
    """One layer's projections with their bias, (T, (Hq + 2 Hkv) D) of each conversation, and its rotary rows."""

    facts: DecoderFacts
    qkv: list[np.ndarray]
    tables: Tables

    def heads(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries (Hq, T, D), keys and values (Hkv, T, D) of a conversation, not rotated."""
        facts = self.facts
        return split_heads(self.qkv[index], facts.num_heads, facts.num_kv_heads, facts.head_dim)


def choose_cache(layer: LayerKeys, bias: np.ndarray | None, wanted: str) -> tuple[LayerCache, np.ndarray | None]:
    """The cache of a layer, and what is kept out of its keys, (Hkv, D) or None.

    Args:
      bias: the offset by the rule of `key_offset`, or None.
      wanted: auto, int8 or fp32.
    """
    ratio, mean = measured_offset(layer)
    offsets = {NONE: None, BIAS: bias, MEAN: mean}
    if bias is None:
        del offsets[BIAS]
    if mean is None:
        del offsets[MEAN]
    errors = {kind: output_error(layer, offset) for kind, offset in offsets.items()}
    dtype, kind, reason = _rule(errors, wanted)
    named = {"int8" if k == NONE else f"int8 {k}": float(f"{error:.3g}") for k, error in errors.items()}
    offset = offsets[kind] if dtype == "int8" else None
    return LayerCache(dtype, kind, float(f"{ratio:.3g}"), named, reason), offset


def _rule(errors: dict[str, float], wanted: str) -> tuple[str, str, str]:
    """Dtype, offset and reason."""
    if wanted == "fp32":
        return "float32", NONE, "chosen by the user"
    kind, plain = NONE, errors[NONE]
    if plain <= OFFSET_ABOVE or len(errors) == 1:
        reason = f"int8 changes attention by {plain:.2g}"
    else:
        kind = BIAS if BIAS in errors else MEAN
        if MEAN in errors and errors[MEAN] < CLEARLY * errors[kind]:
            kind = MEAN
        if errors[kind] >= plain:
            kind = NONE
        reason = f"int8 changes attention by {plain:.2g}, without the offset by {errors[kind]:.2g}"
    if wanted == AUTO and not errors[kind] <= FLOAT_ABOVE:
        return "float32", NONE, f"{reason}: above {FLOAT_ABOVE}"
    return "int8", kind, reason


def measured_offset(layer: LayerKeys) -> tuple[float, np.ndarray | None]:
    """The largest norm of a pair that keys have in common, as a part of what tokens add to a typical pair of the head;
    and the keys' mean (Hkv, D) in the pairs where that is above `LARGEST_RATIO`, or None if it is in none.
    """
    keys = np.concatenate([layer.heads(i)[1] for i in range(len(layer.qkv))], axis=1).astype(np.float64)
    mean, own = keys.mean(axis=1), keys.std(axis=1)
    width = layer.facts.head_dim
    typical = np.median(pair_norms(own, width), axis=1, keepdims=True)
    ratio = pair_norms(mean, width) / np.maximum(typical, np.finfo(np.float64).tiny)
    pairs = ratio > LARGEST_RATIO
    both = np.concatenate([pairs, pairs], axis=1)
    return float(ratio.max()), np.where(both, mean, 0).astype(np.float32) if pairs.any() else None


def output_error(layer: LayerKeys, offset: np.ndarray | None) -> float:
    """Norm of the change of the attention's output with an int8 cache, as a part of the output's norm."""
    changed = total = 0.0
    for index, (cos, sin) in enumerate(layer.tables):
        queries, keys, values = layer.heads(index)
        rows = np.unique(np.linspace(0, queries.shape[1] - 1, QUERIES).astype(np.int64))
        asked = rotate(queries[:, rows], cos[rows], sin[rows])
        exact = _attend(asked, rows, rotate(keys, cos, sin), values)
        if offset is None:
            cached = rounded_rows(rotate(keys, cos, sin))
        else:
            common = np.broadcast_to(offset[:, None], keys.shape)
            cached = rounded_rows(rotate(keys - common, cos, sin)) + rotate(common, cos, sin)
        found = _attend(asked, rows, cached, rounded_rows(values))
        changed += float(np.square(found - exact).sum(dtype=np.float64))
        total += float(np.square(exact).sum(dtype=np.float64))
    return float(np.sqrt(changed / total)) if total else 0.0


def rounded_rows(rows: np.ndarray) -> np.ndarray:
    """(..., D) as an int8 cache holds them."""
    scales = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return np.asarray(np.rint(rows / scales) * scales, np.float32)


def _attend(queries: np.ndarray, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Queries (Hq, n, D) of the tokens `rows` over keys and values (Hkv, T, D), causally."""
    group, width = len(queries) // len(keys), keys.shape[-1]
    ahead = np.arange(keys.shape[1]) > rows[:, None]
    results = []
    for head in range(len(queries)):
        scores = queries[head] @ keys[head // group].T * np.float32(width**-0.5)
        scores[ahead] = -np.inf
        results.append(softmax(scores) @ values[head // group])
    return np.stack(results)

"""The KV cache as the native and the TensorRT graph take it: its arrays by their inputs' names, and rows read back.

Owns which arrays a cache of some capacity is made of. Memory is `place`'s, what the rows mean is said in `contract`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge import contract
from edge.backends.cache_memory import Shape
from edge.backends.place import DevicePlace, HostPlace
from edge.contract import DecoderFacts

SLOT_TABLES = (contract.SLOT_COS, contract.SLOT_SIN)
"""Cosines and sines that each row was written with: part of the cache, and no output of a graph."""
_CODES_A_WORD = 4


def cache_shapes(
    facts: DecoderFacts, dtypes: Sequence[str], capacity_tokens: int, *, has_slot_tables: bool, in_words: bool = False
) -> dict[str, Shape]:
    """Shape and dtype of everything that grows with the capacity, by the graph input's name.

    Args:
      dtypes: of each layer, float32 or int8. in_words: int8 codes are int32 words of four.
    """
    rows = (1, facts.num_kv_heads, capacity_tokens)
    shapes: dict[str, Shape] = {}
    for layer, dtype in enumerate(dtypes):
        words = in_words and dtype == "int8"
        for name in (contract.key_cache_name(layer), contract.value_cache_name(layer)):
            shapes[name] = (
                ((*rows, facts.head_dim // _CODES_A_WORD), "int32") if words else ((*rows, facts.head_dim), dtype)
            )
        if dtype == "int8":
            for name in (contract.key_scales_name(layer), contract.value_scales_name(layer)):
                shapes[name] = (rows, "float32")
    if has_slot_tables:
        shapes |= dict.fromkeys(SLOT_TABLES, ((capacity_tokens, facts.head_dim // 2), "float32"))
    return shapes


def cached_rows(
    place: HostPlace | DevicePlace, cache: Mapping[str, Any], layer: int, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (n, Hkv, D) float32 of some rows of a layer, with the values that codes stand for."""
    parts = []
    for rows_name, scales_name in (
        (contract.key_cache_name(layer), contract.key_scales_name(layer)),
        (contract.value_cache_name(layer), contract.value_scales_name(layer)),
    ):
        stored = place.read(cache[rows_name])
        codes = stored.view(np.int8) if stored.dtype == np.int32 else stored
        rows = codes[0][:, slots].astype(np.float32)
        if scales_name in cache:
            rows *= place.read(cache[scales_name])[0][:, slots, None]
        parts.append(rows.transpose(1, 0, 2))
    return parts[0], parts[1]

"""A small Qwen2-like decoder in plain numpy that honours a `CacheView` as the native kernels do.

Random weights, real attention: the numbers mean nothing, but what a token sees, and at which distance, decides them.
"""

from __future__ import annotations

import numpy as np
from kernel_cases import softmax

from apps.bench.kernel_cases import rotate
from edge.backends.base import CacheView
from edge.contract import DecoderFacts, Manifest


class NumpyDecoder:
    """A `Backend` whose vision tower is a hash and whose decoder is a transformer of `facts.layers` layers.

    Args:
      dtype: of everything, the cache included.
    """

    evicts_in_place = True

    def __init__(self, manifest: Manifest, *, seed: int = 0, dtype: type = np.float64) -> None:
        self._facts = facts = manifest.decoder_facts
        self._merge = manifest.preprocess.merge_size
        self._dtype = dtype
        random = np.random.default_rng(seed)

        def weight(rows: int, columns: int) -> np.ndarray:
            return (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(dtype)

        width = facts.num_heads * facts.head_dim
        self._layers = [
            (
                weight(facts.hidden_size, width + 2 * facts.num_kv_heads * facts.head_dim) * 2,
                weight(width, facts.hidden_size),
                weight(facts.hidden_size, facts.intermediate_size),
                weight(facts.intermediate_size, facts.hidden_size),
            )
            for _ in range(facts.layers)
        ]
        self._head = weight(facts.hidden_size, facts.vocab_size)
        self._frames = np.random.default_rng(seed + 1)
        self._caches: list[tuple[np.ndarray, np.ndarray]] = []

    def allocate_cache(self, capacity_tokens: int) -> None:
        shape = (self._facts.num_kv_heads, capacity_tokens, self._facts.head_dim)
        # What must not be read would be noticed.
        self._caches = [(np.full(shape, 9e9, self._dtype), np.full(shape, 9e9, self._dtype)) for _ in self._layers]

    def cache_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of each layer: (Hkv, C, D), the arrays themselves."""
        return self._caches

    def encode(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        tokens = rows * columns // self._merge**2
        return self._frames.standard_normal((tokens, self._facts.hidden_size)).astype(np.float32)

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView
    ) -> np.ndarray:
        hidden = inputs_embeds.astype(self._dtype)
        for (qkv, out, up, down), (keys, values) in zip(self._layers, self._caches, strict=True):
            heads = _normed(hidden) @ qkv
            hidden = hidden + self._attention(heads, rope_cos, rope_sin, keys, values, view) @ out
            hidden = hidden + np.tanh(_normed(hidden) @ up) @ down
        return (_normed(hidden[-1:]) @ self._head)[0]

    def _attention(
        self,
        heads: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        key_cache: np.ndarray,
        value_cache: np.ndarray,
        view: CacheView,
    ) -> np.ndarray:
        facts, new = self._facts, len(heads)
        queries, keys, values = _split_heads(heads, facts)
        queries, keys = (rotate(x, cos.astype(self._dtype), sin.astype(self._dtype)) for x in (queries, keys))
        key_cache[:, view.new_slots], value_cache[:, view.new_slots] = keys, values
        group = facts.num_heads // facts.num_kv_heads
        seen_values = [values]
        scores = [_scores(queries, keys, group) + np.where(np.tri(new, dtype=bool), 0, -np.inf)]
        for slot, length, run in view.spans:
            further = rotate(queries, view.run_cos[run].astype(self._dtype), view.run_sin[run].astype(self._dtype))
            scores.append(_scores(further, key_cache[:, slot : slot + length], group))
            seen_values.append(value_cache[:, slot : slot + length])
        weights = softmax(np.concatenate(scores, axis=-1) / np.sqrt(facts.head_dim))
        output = weights @ np.repeat(np.concatenate(seen_values, axis=1), group, axis=0)
        return output.transpose(1, 0, 2).reshape(new, -1)


def _normed(hidden: np.ndarray) -> np.ndarray:
    return hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + 1e-6)


def _split_heads(heads: np.ndarray, facts: DecoderFacts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values, each (heads, T, D)."""
    by_head = heads.reshape(len(heads), -1, facts.head_dim).transpose(1, 0, 2)
    keys_from, values_from = facts.num_heads, facts.num_heads + facts.num_kv_heads
    return by_head[:keys_from], by_head[keys_from:values_from], by_head[values_from:]


def _scores(queries: np.ndarray, keys: np.ndarray, group: int) -> np.ndarray:
    return queries @ np.repeat(keys, group, axis=0).transpose(0, 2, 1)

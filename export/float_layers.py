"""The layers of Qwen2.5-VL in numpy, float32: what a conversation's activations are, without torch.

Owns the arithmetic of one layer. Each linear map is asked for by name, so that whoever runs the layers can look at what
goes in, or put another weight in its place. Knows neither files nor turns (see `float_model`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge.contract import DecoderFacts, VisionFacts

Linear = Callable[[str, np.ndarray], np.ndarray]
"""`linear(name, values)`: values (T, K) through the layer's map of that name, its bias added: (T, N)."""
Vector = Callable[[str], np.ndarray]
"""`vector(name)`: a norm's weight."""
Attend = Callable[[np.ndarray], np.ndarray]
"""`attend(qkv)`: (T, (Hq + 2 Hkv) D) to (T, Hq D)."""

QUERY_ROWS = 512
"""Queries at a time: scores take QUERY_ROWS x depth numbers a head."""


class Cache:
    """One layer's rotated keys and its values, (Hkv, T, D) each, for turns that come one by one."""

    def __init__(self) -> None:
        self._keys: np.ndarray | None = None
        self._values: np.ndarray | None = None

    def append(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add rows; return all."""
        if self._keys is not None and self._values is not None:
            keys = np.concatenate([self._keys, keys], axis=1)
            values = np.concatenate([self._values, values], axis=1)
        self._keys, self._values = keys, values
        return keys, values


def rms_norm(values: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Root-mean-square norm over the last axis."""
    mean = np.mean(np.square(values), axis=-1, keepdims=True, dtype=np.float32)
    return np.asarray(values / np.sqrt(mean + np.float32(epsilon)) * weight, np.float32)


def silu(values: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), without overflow."""
    with np.errstate(over="ignore"):
        return np.asarray(values / (1 + np.exp(-values)), np.float32)


def gelu(values: np.ndarray) -> np.ndarray:
    """The exact GELU."""
    from math import erf  # the standard library's is scalar; the merger's rows are few

    halves = np.frompyfunc(erf, 1, 1)(values * np.float32(0.5**0.5)).astype(np.float32)
    return np.asarray(values * (1 + halves) / 2, np.float32)


def rotate(values: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn (..., T, D) by the tables' rows (T, D / 2); element i pairs with element i + D / 2."""
    half = values.shape[-1] // 2
    first, second = values[..., :half], values[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def split_heads(qkv: np.ndarray, heads: int, kv_heads: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T, (Hq + 2 Hkv) D) to queries (Hq, T, D), keys and values (Hkv, T, D)."""
    parts = np.split(qkv, [heads * width, (heads + kv_heads) * width], axis=1)
    queries, keys, values = (part.reshape(len(qkv), -1, width).transpose(1, 0, 2) for part in parts)
    return queries, keys, values


def causal_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The last T of the tokens look back at all: queries (Hq, T, D), keys and values (Hkv, depth, D) to (T, Hq D)."""
    heads, count, width = queries.shape
    depth, group = keys.shape[1], heads // len(keys)
    result = np.empty((count, heads, width), np.float32)
    for head in range(heads):
        own_keys, own_values = keys[head // group], values[head // group]
        for first in range(0, count, QUERY_ROWS):
            rows = queries[head, first : first + QUERY_ROWS]
            seen = depth - count + first + len(rows)
            scores = (rows @ own_keys[:seen].T) * np.float32(width**-0.5)
            ahead = np.arange(seen) > depth - count + first + np.arange(len(rows))[:, None]
            scores[ahead] = -np.inf
            result[first : first + len(rows), head] = softmax(scores) @ own_values[:seen]
    return result.reshape(count, heads * width)


def decoder_attention(facts: DecoderFacts, cos: np.ndarray, sin: np.ndarray, cache: Cache) -> Attend:
    """Rotated, causal attention of new tokens over a cache and themselves."""

    def attend(qkv: np.ndarray) -> np.ndarray:
        queries, keys, values = split_heads(qkv, facts.num_heads, facts.num_kv_heads, facts.head_dim)
        keys, values = cache.append(rotate(keys, cos, sin), values)
        return causal_attention(rotate(queries, cos, sin), keys, values)

    return attend


def decoder_layer(hidden: np.ndarray, attend: Attend, linear: Linear, vector: Vector, epsilon: float) -> np.ndarray:
    """One layer of the language model, (T, W) to (T, W)."""
    qkv = linear("qkv", rms_norm(hidden, vector("input_norm"), epsilon))
    hidden = hidden + linear("attention_output", attend(qkv))
    gate_up = linear("gate_up", rms_norm(hidden, vector("post_norm"), epsilon))
    gate, up = np.split(gate_up, 2, axis=1)
    return hidden + linear("down", silu(gate) * up)


def vision_attention(tower: VisionFacts, cos: np.ndarray, sin: np.ndarray, mask: np.ndarray | None) -> Attend:
    """Attention among the patches of one frame. `mask`: (P, P), added to the scores."""

    def attend(qkv: np.ndarray) -> np.ndarray:
        heads, width = tower.num_heads, tower.head_dim
        queries, keys, values = split_heads(qkv, heads, heads, width)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        result = np.empty((len(qkv), heads, width), np.float32)
        for head in range(heads):
            scores = queries[head] @ keys[head].T * np.float32(width**-0.5)
            if mask is not None:
                scores += mask
            result[:, head] = softmax(scores) @ values[head]
        return result.reshape(len(qkv), heads * width)

    return attend


def vision_block(hidden: np.ndarray, attend: Attend, linear: Linear, vector: Vector, epsilon: float) -> np.ndarray:
    """One block of the vision tower, (P, hidden) to (P, hidden)."""
    hidden = hidden + linear("attention_output", attend(linear("qkv", rms_norm(hidden, vector("norm1"), epsilon))))
    gate_up = linear("gate_up", rms_norm(hidden, vector("norm2"), epsilon))
    gate, up = np.split(gate_up, 2, axis=1)
    return hidden + linear("down", silu(gate) * up)

"""What is taken off a layer's keys before they are quantised to int8.

Owns the rule. Some layers of Qwen2.5 add a bias to a few key channels that is hundreds of times larger than what the
token itself contributes. The scale of an int8 row follows its largest value, so the token's part would drown in
rounding. Attention can add the product of query and bias exactly, with the angles of each row, so the bias need not be
in the cache; that costs time, so it is done only where it matters.
"""

from __future__ import annotations

import numpy as np

LARGEST_RATIO = 3.0
"""A bias up to this many times the token's own part stays in the key; it makes a step about twice as coarse."""


def key_offset(bias: np.ndarray, weight: np.ndarray, norm_weight: np.ndarray, head_dim: int) -> np.ndarray | None:
    """The part of a layer's key bias that is kept out of an int8 cache.

    A channel pair that rotates together is judged as one: its bias is kept out where the norm exceeds `LARGEST_RATIO`
    times what tokens contribute to a typical pair of that head, which is estimated from the weights: the RMS norm
    gives inputs of mean square 1 in each channel before `norm_weight`.

    Args:
      bias: (Hkv D,) of the key projection.
      weight: (Hkv D, W) of the key projection.
      norm_weight: (W,) of the norm before it.
      head_dim: D; element i of a head rotates with element i + D / 2.

    Returns:
      (Hkv, D) float32, 0 in the channels whose bias stays in the key; None if it does in all.
    """
    channels = np.sqrt(np.square(weight * norm_weight).sum(axis=1, dtype=np.float64))
    own = np.median(pair_norms(channels, head_dim), axis=1, keepdims=True)
    pairs = pair_norms(bias, head_dim) > LARGEST_RATIO * own
    if not pairs.any():
        return None
    both = np.concatenate([pairs, pairs], axis=1)
    return np.where(both, bias.reshape(-1, head_dim), 0).astype(np.float32)


def pair_norms(channels: np.ndarray, head_dim: int) -> np.ndarray:
    """Channels, (Hkv D,) or (Hkv, D), to the norms of the pairs that rotate together, (Hkv, D / 2) float64."""
    halves = channels.astype(np.float64).reshape(-1, 2, head_dim // 2)
    return np.hypot(halves[:, 0], halves[:, 1])

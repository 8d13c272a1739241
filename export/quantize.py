"""Float weights to 8 or 4 bits: symmetric, rounded to nearest, one scale for each block along K.

Owns the arithmetic and the packing. Does not know where weights come from or go to.
"""

from __future__ import annotations

import numpy as np

LARGEST = {"int8": 127, "int4": 7}
"""Symmetric, so that zero stays zero and no value needs a zero point."""
SMALLEST_BLOCK = 16


def block_for(k: int, block_size: int) -> int | None:
    """The block along K to use: `block_size`, or the largest smaller power of two that divides `k`; None: none does."""
    block = block_size
    while block >= SMALLEST_BLOCK:
        if k % block == 0:
            return block
        block //= 2
    return None


def padded_width(width: int, block_size: int) -> int:
    """The width that an inner dimension of our own choosing gets, so that a block divides it."""
    return width if block_for(width, block_size) else -(-width // block_size) * block_size


def quantize_blocks(values: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise whole blocks of rows.

    Args:
      values: (K, N) float32, K a multiple of `block`.
      dtype: int8 or int4.

    Returns:
      Codes (K, N) int8 and scales (K / block, N) float32; a value is about code * scale.
    """
    largest = np.float32(LARGEST[dtype])
    blocks = values.reshape(-1, block, values.shape[1])
    scales = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / largest
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales >= np.finfo(np.float32).tiny)
    scaled = blocks * inverse[:, None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, -largest, largest, out=scaled)
    # An all-zero block has zero codes; its scale must still be positive for runtimes that check.
    scales[scales < np.finfo(np.float32).tiny] = 1
    return scaled.astype(np.int8).reshape(values.shape), scales


def dequantize_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes (K, N) and scales (K / block, N) to values (K, N) float32."""
    blocks = codes.reshape(len(scales), -1, codes.shape[1])
    return np.asarray((blocks * scales[:, None]).reshape(codes.shape), np.float32)


def quantize_rows(rows: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, W) of a table, W a multiple of `block`, to int8.

    Returns:
      Codes (n, W) int8 and scales (n, W / block) float32.
    """
    codes, scales = quantize_blocks(np.ascontiguousarray(rows.T), block, "int8")
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Two int4 codes a byte, the first in the low half, in memory order; the number of codes must be even."""
    pairs = codes.reshape(-1, 2).view(np.uint8)
    return (pairs[:, 0] & 0x0F) | (pairs[:, 1] << 4)

"""The memory of a KV cache: one block for all layers, cut into arrays.

Owns the allocation. Large pages are the reason: numpy asks the system for them only for blocks of several megabytes,
one layer's cache is smaller, and reading a cache through small pages is slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ALIGNMENT_BYTES = 64


Shape = tuple[tuple[int, ...], str]
"""Of an array: its sizes and its dtype."""


def array_bytes(shape: Shape) -> int:
    """What one array takes."""
    sizes, dtype = shape
    return math.prod(sizes) * np.dtype(dtype).itemsize


def allocate_arrays(shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Zeroed arrays, each aligned to 64 bytes; they live as long as any of them.

    Raises:
      MemoryError: there is no such block.
    """
    sizes = [array_bytes(shape) for shape in shapes]
    steps = [-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes]
    # Filled, because pages of numpy.zeros are only taken when first written: what lacks should lack at the start.
    block = np.full(sum(steps) + ALIGNMENT_BYTES, 0, np.uint8)
    start = -block.ctypes.data % ALIGNMENT_BYTES
    arrays = []
    for (shape, dtype), size, step in zip(shapes, sizes, steps, strict=True):
        arrays.append(block[start : start + size].view(dtype).reshape(shape))
        start += step
    return arrays

"""Weights on their way to disk: appended to an external-data file piece by piece, and found again by name.

Owns offsets, alignment and hashes. Knows neither what a weight is for nor the graph that will read it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edge.contract import FileFacts

PAGE_BYTES = 4096
LARGE_BYTES = 1 << 16
VECTOR_BYTES = 64
BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class StoredTensor:
    """Where a weight lies: `length` bytes from `offset` in `file`, row-major."""

    file: str
    offset: int
    length: int
    dtype: str  # float32, float16, int8 or int4 (two values a byte, the first in the low half)
    shape: tuple[int, ...]

    def rows(self, first: int, last: int) -> StoredTensor:
        """The part that holds rows `first` to `last`."""
        row = self.length // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return StoredTensor(self.file, self.offset + first * row, (last - first) * row, self.dtype, shape)


@dataclass(frozen=True)
class Columns:
    """Columns `first` to `last` of the stored matrix `weight`.weight (K, N)."""

    weight: str
    first: int
    last: int


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes on disk."""
    return (math.prod(shape) * BITS[dtype] + 7) // 8


class WeightFile:
    """An external-data file that is being written. Use as a context manager; it is synced to disk on leaving."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def append(self, dtype: str, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> StoredTensor:
        """Write one tensor, given as arrays that follow one another in memory order.

        Raises:
          ValueError: the pieces do not add up to the shape.
        """
        length = stored_bytes(dtype, shape)
        step = PAGE_BYTES if length >= LARGE_BYTES else VECTOR_BYTES
        self._write(bytes(-self.bytes % step))
        offset = self.bytes
        for piece in pieces:
            self._write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if self.bytes - offset != length:
            given = self.bytes - offset
            raise ValueError(f"a {dtype} tensor of shape {shape} takes {length} bytes, {given} were given")
        return StoredTensor(self.path.name, offset, length, dtype, shape)

    def facts(self) -> FileFacts:
        """Size and hash of what has been written."""
        return FileFacts(self.bytes, self._hash.hexdigest())

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)

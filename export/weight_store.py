"""Weights on their way to disk: appended to an external-data file piece by piece, and found again by name.

Owns offsets, alignment and hashes, and the going on behind what an interrupted export finished. Knows neither what a
weight is for nor the graph that will read it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edge.contract import FileFacts
from export.resume import Journal, Kind

READ_BYTES = 8 << 20
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
    """An external-data file that is being written. Use as a context manager; it is synced to disk on leaving.

    Tensors are appended in one fixed order. Those that a `journal` knows to be finished are not computed again: their
    pieces are not asked for.

    Attributes:
      bytes, tensors: how many were appended so far.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self.path = path
        self.bytes = 0
        self.tensors = 0
        self._hash = hashlib.sha256()
        self._journal = journal
        self._kinds: list[Kind] = []  # of the tensors since the last mark
        self._found: list[Kind] = []  # of those that were in the file already, as far as they were appended again
        self._finished: list[Kind] = []  # of those that are in the file already and will be appended next
        self._file = path.open("r+b" if path.is_file() else "w+b")
        self._take_up(path.name)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.mark()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            with suppress(OSError):  # what is still buffered finds no room on a full disk
                self._file.close()

    def append(self, dtype: str, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> StoredTensor:
        """Write one tensor, given as arrays that follow one another in memory order.

        Raises:
          ValueError: the pieces do not add up to the shape.
        """
        length = stored_bytes(dtype, shape)
        step = PAGE_BYTES if length >= LARGE_BYTES else VECTOR_BYTES
        self.tensors += 1
        if self._finished and self._finished[0] != (dtype, shape):
            self._leave_the_rest()
        if self._finished:
            self._found.append(self._finished.pop(0))
            offset = self.bytes + -self.bytes % step
            self.bytes = offset + length
            return StoredTensor(self.path.name, offset, length, dtype, shape)
        self._write(bytes(-self.bytes % step))
        offset = self.bytes
        for piece in pieces:
            self._write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if self.bytes - offset != length:
            given = self.bytes - offset
            raise ValueError(f"a {dtype} tensor of shape {shape} takes {length} bytes, {given} were given")
        self._kinds.append((dtype, shape))
        return StoredTensor(self.path.name, offset, length, dtype, shape)

    def mark(self) -> None:
        """The tensors so far are one group that need not be written again after an interruption."""
        if self._journal is None or not self._kinds:
            return
        self._file.flush()
        self._journal.record(self.path.name, tuple(self._kinds), self.bytes, self._hash.copy().hexdigest())
        self._kinds = []

    def found(self) -> int:
        """How many tensors the file holds already, to be appended next."""
        return len(self._finished)

    def write_the_rest(self) -> None:
        """Write what follows anew, also where the file holds it already."""
        if self._finished:
            self._leave_the_rest()
            self.mark()

    def facts(self) -> FileFacts:
        """Size and hash of what has been written."""
        return FileFacts(self.bytes, self._hash.hexdigest())

    def _take_up(self, name: str) -> None:
        """Go on behind what the journal says is finished, if the file still holds it."""
        finished = self._journal.finished(name) if self._journal else None
        if finished and self._journal:
            self._cut(finished.bytes)
            if self._hash.hexdigest() == finished.sha256:
                self._finished = list(finished.kinds)
                self.bytes = 0  # counted again as the tensors are appended
                return
            self._journal.forget(name)
        self._cut(0)

    def _leave_the_rest(self) -> None:
        """What was found goes on with another tensor than is appended now."""
        if self._journal:
            self._journal.forget(self.path.name)
        self._kinds = self._found
        self._cut(self.bytes)

    def _cut(self, length: int) -> None:
        """Keep the first `length` bytes, and write on behind them."""
        self._hash, self.bytes, self._finished = hashlib.sha256(), 0, []
        self._file.seek(0)
        while self.bytes < length and (piece := self._file.read(min(READ_BYTES, length - self.bytes))):
            self._hash.update(piece)
            self.bytes += len(piece)
        self._file.seek(self.bytes)
        self._file.truncate()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)

"""Weights streamed to one file: fused from tensors, transposed, converted or rounded to nearest.

Owns how a weight is written, and where each tensor of the checkpoint went. Holds one weight at a time. Which weights
there are is `weights`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from edge.errors import CheckpointError
from export.checkpoint import Checkpoint
from export.plan import QUANTIZED
from export.quantize import block_for, pack_int4, quantize_blocks, quantize_rows
from export.weight_store import Columns, StoredTensor, WeightFile

PIECE_VALUES = 4 << 20
FLOAT16_MAX = 65504.0
EMBEDDING_BLOCK = 128
"""Columns of an int8 embedding table that share a scale."""

Step = Callable[[int, int], None]
"""Called as weights are written: (done, total)."""


@dataclass
class WeightWriter:
    """Writes named weights to one external-data file, and remembers where each lies.

    Args:
      block: rows (along K) that share a scale in int8 and int4 weights.
    """

    checkpoint: Checkpoint
    file: WeightFile
    block: int = 32
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    columns: dict[str, Columns] = field(default_factory=dict)  # where each tensor of a matrix went
    rows: dict[str, Columns] = field(default_factory=dict)  # and each vector
    notes: list[str] = field(default_factory=list)

    def vector(self, name: str, *sources: str, width: int | None = None) -> None:
        """A norm's weight or a bias: always float32; several sources are joined, each filled up to `width` with 0."""
        parts = [self.checkpoint.read(source) for source in sources]
        first = 0
        for source, part in zip(sources, parts, strict=True):
            self.rows[source] = Columns(name, first, first + len(part))
            first += width or len(part)
        self.array(name, np.concatenate([np.pad(part, (0, (width or len(part)) - len(part))) for part in parts]))

    def array(self, name: str, values: np.ndarray) -> None:
        """A float32 weight that is computed here."""
        self.stored[name] = self.file.append("float32", values.shape, [values.astype(np.float32)])

    def folded(self, name: str, source: str, dtype: str) -> None:
        """A convolution (N, channels, time, y, x) over equal frames as a linear map (channels y x, N), not quantised.

        Equal frames meet the sum of their weights over time.
        """
        values = self.checkpoint.read(source).astype(np.float64).sum(axis=2)
        values = values.reshape(len(values), -1).T.astype(np.float32)
        self.columns[source] = Columns(name, 0, values.shape[1])
        self.stored[f"{name}.weight"] = self.file.append(dtype, values.shape, [_convert(values, dtype, name)])

    def matrix(
        self, name: str, sources: list[str], dtype: str, *, rows: int | None = None, width: int | None = None
    ) -> None:
        """A linear map's weight `name`.weight (K, N), from tensors (N_i, K) that are joined along N.

        Args:
          rows: K is filled up to it with zeros.
          width: each N_i is filled up to it with zeros.
        """
        columns = MatrixColumns(self.checkpoint, sources, rows, width)
        dtype, block = self.fitting(name, columns, dtype)
        if dtype in ("float32", "float16"):
            self._place(name, columns)
            pieces = (_convert(values, dtype, name) for values in columns.pieces(1))
            self.stored[f"{name}.weight"] = self.file.append(dtype, (columns.k, columns.n), pieces)
            return
        scales: list[np.ndarray] = []
        self.codes(name, columns, dtype, block, self._nearest(columns, block, dtype, scales), scales)

    def fitting(self, name: str, columns: MatrixColumns, dtype: str) -> tuple[str, int]:
        """The dtype and block that a weight of this shape can have where `dtype` is wanted; says where they differ."""
        if dtype not in QUANTIZED:
            return dtype, 0
        block = block_for(columns.k, self.block)
        if block is None or (dtype == "int4" and columns.n % 2):
            self.notes.append(
                f"{name} stays float16: no block of 16 or more divides {columns.k}, or {columns.n} is odd"
            )
            return "float16", 0
        if block != self.block:
            self.notes.append(f"{name} has blocks of {block}: K = {columns.k} is not a multiple of {self.block}")
        return dtype, block

    def codes(
        self,
        name: str,
        columns: MatrixColumns,
        dtype: str,
        block: int,
        codes: Iterable[np.ndarray],
        scales: Iterable[np.ndarray],
    ) -> None:
        """A quantised weight: codes (K, N) int8 in pieces along K, then scales (K / block, N) float32 in pieces."""
        self._place(name, columns)
        packed = (pack_int4(piece) if dtype == "int4" else piece for piece in codes)
        self.stored[f"{name}.weight"] = self.file.append(dtype, (columns.k, columns.n), packed)
        self.stored[f"{name}.scale"] = self.file.append("float32", (columns.k // block, columns.n), scales)

    def _place(self, name: str, columns: MatrixColumns) -> None:
        for source, first in zip(columns.sources, columns.firsts, strict=True):
            self.columns[source] = Columns(name, first, first + self.checkpoint.entries[source].shape[0])

    def table(self, name: str, source: str, dtype: str) -> None:
        """A weight that keeps its rows as they are: (rows, columns). In int8 `name`.scale is beside it."""
        shape = self.checkpoint.entries[source].shape
        block = block_for(shape[1], EMBEDDING_BLOCK) if dtype == "int8" else None
        if dtype == "int8" and block is None:
            self.notes.append(f"{name} stays float16: no block of 16 or more divides {shape[1]}")
            dtype = "float16"
        pieces = self.checkpoint.rows(source, max(1, PIECE_VALUES // shape[1]))
        if block is None:
            self.stored[name] = self.file.append(dtype, shape, (_convert(rows, dtype, name) for rows in pieces))
            return
        scales: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for rows in pieces:
                piece, piece_scales = quantize_rows(rows, block)
                scales.append(piece_scales)
                yield piece

        self.stored[name] = self.file.append("int8", shape, codes())
        self.stored[f"{name}.scale"] = self.file.append("float32", (shape[0], shape[1] // block), scales)

    @staticmethod
    def _nearest(columns: MatrixColumns, block: int, dtype: str, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
        for values in columns.pieces(block):
            codes, piece_scales = quantize_blocks(values, block, dtype)
            scales.append(piece_scales)
            yield codes


class MatrixColumns:
    """Tensors (N_i, K), held as stored and handed out transposed, some of K at a time, filled up with zeros."""

    def __init__(self, checkpoint: Checkpoint, sources: list[str], rows: int | None, width: int | None) -> None:
        self.sources = sources
        self._parts = [checkpoint.columns(source) for source in sources]
        self.firsts: list[int] = []  # where each tensor's columns start
        self.n = 0
        for part in self._parts:
            self.firsts.append(self.n)
            self.n += width or part.shape[0]
        self._own_k = self._parts[0].shape[1]
        self.k = rows or self._own_k

    def whole(self) -> np.ndarray:
        """All of it, (K, N) float32."""
        values, first = np.empty((self.k, self.n), np.float32), 0
        for piece in self.pieces(1):
            values[first : first + len(piece)] = piece
            first += len(piece)
        return values

    def pieces(self, multiple: int) -> Iterator[np.ndarray]:
        """(rows, N) float32, C-contiguous, rows a multiple of `multiple`; the last piece may be smaller."""
        rows = max(1, PIECE_VALUES // self.n // multiple) * multiple
        for first in range(0, self.k, rows):
            own = max(0, min(rows, self._own_k - first))
            piece = np.zeros((min(rows, self.k - first), self.n), np.float32)
            for part, column in zip(self._parts, self.firsts, strict=True):
                part.read_into(piece[:own, column : column + part.shape[0]], first)
            yield piece


def _convert(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    if dtype == "float32":
        return values
    largest = max(float(values.max()), -float(values.min()))
    if largest > FLOAT16_MAX:
        raise CheckpointError(
            f"Weight `{name}` holds {largest:.4g}, float16 ends at {FLOAT16_MAX:.0f}",
            hint="Export with `--weights fp32`",
        )
    return values.astype(np.float16)

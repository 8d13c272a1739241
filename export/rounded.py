"""A checkpoint whose values are those that a bundle stores, after rounding to fewer bits.

Owns the way back from stored weights to the checkpoint's tensors. With it the parity check tells what rounding does to
the model from what a graph does wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint import Checkpoint
from export.quantize import dequantize_blocks
from export.tensor_names import EMBEDDING
from export.weight_store import StoredTensor
from export.weight_writer import WeightWriter


@dataclass(frozen=True)
class Matrix:
    """Columns `first` to `last` of a stored matrix (K, N), with its block scales if it is quantised."""

    weight: StoredTensor
    scale: StoredTensor | None
    first: int
    last: int


@dataclass(frozen=True)
class RoundedCheckpoint(Checkpoint):
    """An opened checkpoint that reads its values from the weight files of a bundle in `bundle`.

    Args:
      matrices: a tensor's stored matrix (K, N), its block scales or None, and its columns in both; a tensor that is
        not named is a vector, stored exactly, and read from the checkpoint.
      vectors: where each of those lies all the same.
      embedding: the token embeddings, (V, W), and `embedding_scale` of each block of a row, or None.
      head: the head where it is no matrix but rows, (V, W).
    """

    bundle: Path = Path()
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    vectors: Mapping[str, StoredTensor] = field(default_factory=dict)
    embedding: StoredTensor | None = None
    embedding_scale: StoredTensor | None = None
    head: StoredTensor | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        bundle: Path,
        writers: Iterable[WeightWriter],
        embedding: Mapping[str, StoredTensor],
    ) -> RoundedCheckpoint:
        """`checkpoint` with the values that `writers` wrote; `embedding` as in `proof.Written`."""
        own: dict[str, Any] = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
        own |= {"embedding": embedding["embedding"], "embedding_scale": embedding.get("embedding.scale")}
        matrices: dict[str, Matrix] = {}
        vectors: dict[str, StoredTensor] = {}
        head = None
        for writer in writers:
            stored = writer.stored
            head = stored.get("head.weight", head)
            vectors |= {name: stored[place.weight].rows(place.first, place.last) for name, place in writer.rows.items()}
            for name, place in writer.columns.items():
                weight, scale = stored[f"{place.weight}.weight"], stored.get(f"{place.weight}.scale")
                matrices[name] = Matrix(weight, scale, place.first, place.last)
        return cls(**own, bundle=bundle, matrices=matrices, vectors=vectors, head=head)

    def read(self, name: str) -> np.ndarray:
        """A whole tensor as float32."""
        matrix = self.matrices.get(name)
        if matrix is None:
            return super().read(name)
        values, shape = self._columns(matrix, matrix.first, matrix.last), self.entries[name].shape
        if len(shape) == 2:
            return values[:, : shape[1]]  # without the rows that it was filled up with
        slices = shape[2]  # a convolution, summed over time: any values with that sum will do
        whole = (values / np.float32(slices)).reshape(shape[0], shape[1], 1, *shape[3:])
        return np.ascontiguousarray(np.broadcast_to(whole, shape))

    def first_rows(self, name: str, count: int) -> np.ndarray:
        """The first rows of a matrix (N, K), as float32."""
        matrix, (rows, width) = self.matrices[name], self.entries[name].shape
        return self._columns(matrix, matrix.first, matrix.first + min(count, rows))[:, :width]

    def token_rows(self, first: int, last: int) -> np.ndarray:
        """Embeddings of the tokens `first` to `last`, (last - first, W) float32."""
        rows = self._rows(self.embedding, first, last)
        if self.embedding_scale is None:
            return rows
        scales = self._rows(self.embedding_scale, first, last)
        return np.asarray((rows.reshape(*scales.shape, -1) * scales[..., None]).reshape(rows.shape))

    def head_rows(self, rows_at_a_time: int) -> Iterator[np.ndarray]:
        """The head's rows as float32, `rows_at_a_time` at a time."""
        count = self.entries[EMBEDDING].shape[0]
        matrix = self.matrices.get(self.head_name)
        for first in range(0, count, rows_at_a_time):
            last = min(first + rows_at_a_time, count)
            yield self._rows(self.head, first, last) if matrix is None else self._columns(matrix, first, last)

    def _rows(self, stored: StoredTensor | None, first: int, last: int) -> np.ndarray:
        if stored is None:
            raise ValueError("a bundle has an embedding table and a head")
        return np.asarray(self._values(stored)[first:last], np.float32)

    def _columns(self, matrix: Matrix, first: int, last: int) -> np.ndarray:
        """Columns of a stored matrix (K, N) as rows (last - first, K) float32."""
        codes = matrix.weight
        if codes.dtype == "int4":
            packed = self._values(codes)[:, first // 2 : (last + 1) // 2]
            values = np.empty((packed.shape[0], 2 * packed.shape[1]), np.float32)
            values[:, 0::2] = (packed << 4).view(np.int8) >> 4  # shifting back fills with the sign
            values[:, 1::2] = packed.view(np.int8) >> 4
            values = values[:, first % 2 : first % 2 + last - first]
        else:
            values = np.asarray(self._values(codes)[:, first:last], np.float32)
        if matrix.scale is not None:
            values = dequantize_blocks(values, self._values(matrix.scale)[:, first:last])
        return np.ascontiguousarray(values.T)

    def _values(self, stored: StoredTensor) -> np.ndarray:
        """The stored numbers, mapped; int4 as bytes of two, half as wide."""
        shape = stored.shape
        dtype = np.dtype(stored.dtype if stored.dtype != "int4" else "uint8")
        if stored.dtype == "int4":
            shape = (shape[0], shape[1] // 2)
        return np.memmap(self.bundle / stored.file, dtype, "r", stored.offset, shape)

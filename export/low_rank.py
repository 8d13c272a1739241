"""One tensor's low-rank update, W + scale B A, added to rows as they are read.

Owns the arithmetic, in float32, over a fixed grid of rows, so that a tensor read in pieces has the bytes of the tensor
read whole. Does not know files of adapters, nor which tensor is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.safetensors_file import TensorEntry, read_raw, require_finite, to_float32

GRID_ROWS = 256
"""Rows that are multiplied together; how a BLAS library sums may depend on the number of rows it is given."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a tensor (N, ...) of N rows and K numbers a row.

    Args:
      left: (N, r), or (r, N) if `transposed`.
      right: (r, K), or (K, r) if `transposed`.
      scale: of the product.
      magnitude: (N,) norms that the rows are given after the addition (DoRA), or None.
      transposed: as PEFT keeps the two factors of an embedding table.
    """

    left: TensorEntry
    right: TensorEntry
    scale: float
    magnitude: TensorEntry | None = None
    transposed: bool = False

    def opened(self) -> OpenedLowRank:
        """The factors, read.

        Raises:
          CheckpointError: a factor holds a value that is infinite or not a number.
        """
        left, right = (to_float32(read_raw(entry), entry) for entry in (self.left, self.right))
        if self.transposed:
            left, right = np.ascontiguousarray(left.T), np.ascontiguousarray(right.T)
        rank = left.shape[1]
        magnitude = None if self.magnitude is None else to_float32(read_raw(self.magnitude), self.magnitude)
        return OpenedLowRank(left.reshape(-1, rank), right.reshape(rank, -1), np.float32(self.scale), magnitude)


@dataclass(frozen=True)
class OpenedLowRank:
    """The factors (N, r) and (r, K) in memory."""

    left: np.ndarray
    right: np.ndarray
    scale: np.float32
    magnitude: np.ndarray | None

    def rows(self, entry: TensorEntry, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of the tensor `entry` with the update, float32.

        Raises:
          CheckpointError: a value is infinite or not a number, before or after the addition; names the tensor.
        """
        merged = np.empty((last - first, *entry.shape[1:]), np.float32)
        for start in range(first - first % GRID_ROWS, last, GRID_ROWS):
            stop = min(start + GRID_ROWS, entry.shape[0])
            block = self._block(to_float32(read_raw(entry, start, stop), entry), start, stop)
            own_start, own_stop = max(start, first), min(stop, last)
            merged[own_start - first : own_stop - first] = block[own_start - start : own_stop - start]
        require_finite(merged, f"Tensor `{entry.name}` with the adapter added")
        return merged

    def _block(self, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            flat = values.reshape(stop - start, -1)
            flat += (self.left[start:stop] @ self.right) * self.scale
            if self.magnitude is not None:
                norms = np.sqrt(np.square(flat).sum(axis=1, dtype=np.float64)).astype(np.float32)
                flat *= (self.magnitude.reshape(-1)[start:stop] / norms)[:, None]
        return values

"""The embedding table of a bundle, memory-mapped: rows are read when a token needs them.

Owns the table's layouts. Does not know what the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge.contract import EmbeddingTable


class Embeddings:
    """Rows of one table. An int8 table has a scale for each block of columns; see `contract.EmbeddingTable`."""

    def __init__(self, table: EmbeddingTable, path: Path) -> None:
        self._rows = np.memmap(path, np.dtype(table.dtype), "r", shape=(table.rows, table.columns))
        self._scales: np.ndarray | None = None
        if table.dtype == "int8":
            shape = (table.rows, table.columns // table.block_size)
            self._scales = np.memmap(path, np.float32, "r", table.scales_offset, shape)

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings (n, W) of `ids`, float32 or float16."""
        found = self._rows[list(ids)]
        if self._scales is None:
            return found
        scales = self._scales[list(ids)]
        blocks = found.reshape(*scales.shape, found.shape[1] // scales.shape[1]) * scales[..., None]
        return np.asarray(blocks.reshape(found.shape))

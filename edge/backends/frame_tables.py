"""What the vision graphs take beside a frame's patches, kept for the last few frame sizes.

Owns what is kept. What the tables hold is `edge.rope`'s.
"""

from __future__ import annotations

from edge.contract import VisionFacts
from edge.preprocess import PreprocessConfig
from edge.rope import FrameTables, frame_tables, window_ordered_tables

MAX_SIZES_KEPT = 8


class FrameTableCache:
    """The tables of frame sizes, computed once for each.

    Args:
      native: whether they are for the native graph.
    """

    def __init__(self, facts: VisionFacts, preprocess: PreprocessConfig, *, native: bool) -> None:
        self._facts, self._preprocess = facts, preprocess
        self._tables_of = window_ordered_tables if native else frame_tables
        self._kept: dict[tuple[int, int], FrameTables] = {}

    def of(self, rows: int, columns: int) -> FrameTables:
        """The tables of frames of rows x columns patches."""
        tables = self._kept.get((rows, columns))
        if tables is None:
            merge, patch_size = self._preprocess.merge_size, self._preprocess.patch_size
            tables = self._tables_of(rows, columns, self._facts, merge=merge, patch_size=patch_size)
            if len(self._kept) >= MAX_SIZES_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[rows, columns] = tables
        return tables

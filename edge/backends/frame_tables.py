"""What the vision graphs take beside a frame's patches, kept for the last few frame sizes.

Owns the order of patches: `patchify`'s for the stock graph, window by window for the native one, and the way back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge import contract
from edge.contract import Manifest
from edge.rope import frame_tables, vision_tables, window_order

MAX_SIZES_KEPT = 8


@dataclass(frozen=True)
class FrameTables:
    """Everything of one frame size.

    Attributes:
      feeds: inputs of the graph beside the patches.
      patch_order: (P,) which patch comes at each place; None leaves them as they are.
      token_places: (N,) where each visual token comes out; None where they come in `patchify`'s order.
    """

    feeds: dict[str, np.ndarray]
    patch_order: np.ndarray | None = None
    token_places: np.ndarray | None = None


class FrameTableCache:
    """The tables of frame sizes, computed once for each.

    Args:
      native: whether they are for the native graph.
    """

    def __init__(self, manifest: Manifest, *, native: bool) -> None:
        self._facts, self._preprocess = manifest.vision_facts, manifest.preprocess
        self._native = native
        self._kept: dict[tuple[int, int], FrameTables] = {}

    def of(self, rows: int, columns: int) -> FrameTables:
        """The tables of frames of rows x columns patches."""
        tables = self._kept.get((rows, columns))
        if tables is None:
            tables = self._native_tables(rows, columns) if self._native else self._stock_tables(rows, columns)
            if len(self._kept) >= MAX_SIZES_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[rows, columns] = tables
        return tables

    def _stock_tables(self, rows: int, columns: int) -> FrameTables:
        merge, patch_size = self._preprocess.merge_size, self._preprocess.patch_size
        cos, sin, mask = frame_tables(rows, columns, self._facts, merge=merge, patch_size=patch_size)
        return FrameTables({contract.VISION_COS: cos, contract.VISION_SIN: sin, contract.WINDOW_MASK: mask})

    def _native_tables(self, rows: int, columns: int) -> FrameTables:
        merge, patch_size = self._preprocess.merge_size, self._preprocess.patch_size
        window_patches = self._facts.window_size // patch_size // merge * merge
        order, starts = window_order(rows, columns, merge, window_patches)
        cos, sin = vision_tables(rows, columns, merge, self._facts.head_dim)
        feeds = {contract.VISION_COS: cos[order], contract.VISION_SIN: sin[order], contract.WINDOW_STARTS: starts}
        token_order = order[:: merge**2] // merge**2  # patches of one token stay together
        return FrameTables(feeds, order, np.argsort(token_order))

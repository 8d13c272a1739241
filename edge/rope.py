"""Positions of a conversation's tokens and the rotary tables of both towers.

Owns the numbers that multimodal RoPE needs: a text token advances time, row and column alike; a frame's tokens share
their time and spread over rows and columns. Angles are computed in double. Owns too what a vision graph takes beside a
frame's patches, and in which order it takes them. Does not know which tokens are cached.
Follows `get_rope_index`, `Qwen2_5_VLRotaryEmbedding` and `get_window_index` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge import contract
from edge.contract import DecoderFacts, VisionFacts

VISION_ROPE_THETA = 10000.0
MASKED_SCORE = -1e30


def text_positions(start: int, count: int) -> np.ndarray:
    """(3, count) int64 positions of `count` text tokens; the next token is at `start + count`."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count))


def image_positions(start: int, rows: int, columns: int) -> np.ndarray:
    """(3, rows * columns) int64 positions of a frame's visual tokens, row by row.

    The next token is at `start + max(rows, columns)`.
    """
    positions = np.empty((3, rows * columns), np.int64)
    positions[0] = start
    positions[1] = start + np.repeat(np.arange(rows), columns)
    positions[2] = start + np.tile(np.arange(columns), rows)
    return positions


class MultimodalRope:
    """Cosine and sine rows for three-axis positions.

    Args:
      head_dim: width D of one attention head.
      theta: base of the frequencies.
      sections: how many of the D / 2 frequencies follow time, row and column.
    """

    def __init__(self, head_dim: int, theta: float, sections: tuple[int, ...]) -> None:
        half = head_dim // 2
        self._inverse_frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
        self._axis_of_frequency = np.repeat(np.arange(len(sections)), sections)

    def tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotary rows of T tokens.

        Args:
          positions: (3, T) int64.

        Returns:
          cosines and sines, each (T, D / 2) float32.
        """
        angles = positions[self._axis_of_frequency].T * self._inverse_frequency
        return _float32(np.cos(angles)), _float32(np.sin(angles))


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def decoder_rope(facts: DecoderFacts) -> MultimodalRope:
    """The decoder's rotary rows."""
    return MultimodalRope(facts.head_dim, facts.rope_theta, facts.mrope_section)


def merge_order(rows: int, columns: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch, in the order of `preprocess.patchify`: (P,) int64 each."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")

    def grouped(values: np.ndarray) -> np.ndarray:
        blocks = values.reshape(rows // merge, merge, columns // merge, merge)
        return blocks.transpose(0, 2, 1, 3).reshape(-1)

    return grouped(row), grouped(column)


def vision_tables(rows: int, columns: int, merge: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Two-dimensional rotary rows of a frame's patches: the first half of the angles follows rows, the second columns.

    Returns:
      cosines and sines, each (P, D / 2) float32 with P = rows * columns.
    """
    quarter = head_dim // 4
    inverse_frequency = VISION_ROPE_THETA ** (-np.arange(quarter, dtype=np.float64) / quarter)
    row, column = merge_order(rows, columns, merge)
    angles = np.concatenate([row[:, None] * inverse_frequency, column[:, None] * inverse_frequency], axis=1)
    return _float32(np.cos(angles)), _float32(np.sin(angles))


def window_mask(rows: int, columns: int, merge: int, window_patches: int) -> np.ndarray:
    """What is added to attention scores in windowed blocks: 0 within a window, a very low number across windows.

    Args:
      window_patches: side of a window in patches; a multiple of `merge`. Windows start at the top left corner and
        are cut at the right and lower edge.

    Returns:
      (P, P) float32.
    """
    window = _windows(rows, columns, merge, window_patches)
    return np.where(window[:, None] == window[None, :], np.float32(0), np.float32(MASKED_SCORE))


def window_order(rows: int, columns: int, merge: int, window_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which patches of one window lie side by side, for the native vision graph.

    The patches of a merge block stay together, so the tokens made of them are ordered by every `merge`**2-th of these.

    Returns:
      order: (P,) int64, the patch of `patchify` that comes at each place.
      starts: (windows + 1,) int32, where each window starts, and P.
    """
    window = _windows(rows, columns, merge, window_patches)
    order = np.argsort(window, kind="stable")
    starts = np.flatnonzero(np.diff(window[order], prepend=-1))
    return order, np.append(starts, len(order)).astype(np.int32)


def _windows(rows: int, columns: int, merge: int, window_patches: int) -> np.ndarray:
    """The number of each patch's window: (P,) int64, rising from left to right and from top to bottom."""
    row, column = merge_order(rows, columns, merge)
    return (row // window_patches) * (columns // window_patches + 1) + column // window_patches


@dataclass(frozen=True)
class FrameTables:
    """What a vision graph needs to know of one frame size.

    Attributes:
      feeds: inputs of the graph beside the patches.
      patch_order: (P,) which patch comes at each place; None leaves them in `patchify`'s order.
      token_places: (N,) where each visual token comes out; None where they come in `patchify`'s order.
    """

    feeds: dict[str, np.ndarray]
    patch_order: np.ndarray | None = None
    token_places: np.ndarray | None = None

    def arranged(self, patches: np.ndarray) -> np.ndarray:
        """Patches (P, ...) of `patchify` as the graph takes them."""
        return patches if self.patch_order is None else patches[self.patch_order]

    def restored(self, tokens: np.ndarray) -> np.ndarray:
        """The graph's visual tokens (N, ...) in `patchify`'s order."""
        return tokens if self.token_places is None else tokens[self.token_places]


def frame_tables(rows: int, columns: int, facts: VisionFacts, *, merge: int, patch_size: int) -> FrameTables:
    """For the stock graph and a frame of rows x columns patches: windows are a mask."""
    cos, sin = vision_tables(rows, columns, merge, facts.head_dim)
    mask = window_mask(rows, columns, merge, _window_patches(facts, merge, patch_size))
    return FrameTables({contract.VISION_COS: cos, contract.VISION_SIN: sin, contract.WINDOW_MASK: mask})


def window_ordered_tables(rows: int, columns: int, facts: VisionFacts, *, merge: int, patch_size: int) -> FrameTables:
    """The same for the native graph: patches come window by window."""
    order, starts = window_order(rows, columns, merge, _window_patches(facts, merge, patch_size))
    cos, sin = vision_tables(rows, columns, merge, facts.head_dim)
    feeds = {contract.VISION_COS: cos[order], contract.VISION_SIN: sin[order], contract.WINDOW_STARTS: starts}
    token_order = order[:: merge**2] // merge**2  # patches of one token stay together
    return FrameTables(feeds, order, np.argsort(token_order))


def _window_patches(facts: VisionFacts, merge: int, patch_size: int) -> int:
    """Side of an attention window in patches: whole merge blocks."""
    return facts.window_size // patch_size // merge * merge

"""Positions of a conversation's tokens and the rotary tables of both towers.

Owns the numbers that multimodal RoPE needs: a text token advances time, row and column alike; a frame's tokens share
their time and spread over rows and columns. Angles are computed in double. Does not know which tokens are cached.
Follows `get_rope_index`, `Qwen2_5_VLRotaryEmbedding` and `get_window_index` of transformers.
"""

from __future__ import annotations

import numpy as np

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
    row, column = merge_order(rows, columns, merge)
    window = (row // window_patches) * (columns // window_patches + 1) + column // window_patches
    return np.where(window[:, None] == window[None, :], np.float32(0), np.float32(MASKED_SCORE))


def window_order(rows: int, columns: int, merge: int, window_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which patches of one window lie side by side, for the native vision graph.

    The patches of a merge block stay together, so the tokens made of them are ordered by every `merge`**2-th of these.

    Returns:
      order: (P,) int64, the patch of `patchify` that comes at each place.
      starts: (windows + 1,) int32, where each window starts, and P.
    """
    row, column = merge_order(rows, columns, merge)
    window = (row // window_patches) * (columns // window_patches + 1) + column // window_patches
    order = np.argsort(window, kind="stable")
    starts = np.flatnonzero(np.diff(window[order], prepend=-1))
    return order, np.append(starts, len(order)).astype(np.int32)


def frame_tables(
    rows: int, columns: int, facts: VisionFacts, *, merge: int, patch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the vision graph takes beside the patches of a frame of rows x columns patches: cosines, sines, mask."""
    window_patches = facts.window_size // patch_size // merge * merge
    cos, sin = vision_tables(rows, columns, merge, facts.head_dim)
    return cos, sin, window_mask(rows, columns, merge, window_patches)

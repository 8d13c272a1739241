"""A camera frame to visual tokens: preprocessing and the vision graph.

Owns which frames are taken. Knows neither what the graph needs beside patches nor what becomes of the tokens.
"""

from __future__ import annotations

import numpy as np

from edge.backends.base import Backend
from edge.contract import Manifest
from edge.decoder import FrameTokens
from edge.errors import FrameError
from edge.frames import check_pixels
from edge.preprocess import grid_of, patchify, resize_frame, smart_resize


class VisionEncoder:
    """Encodes frames of any size with one bundle's vision tower."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self._preprocess = manifest.preprocess
        self._max_visual_tokens = manifest.max_visual_tokens
        self._backend = backend

    def resize(self, pixels: object) -> np.ndarray:
        """The frame at the model's size: (H, W, 3) uint8 RGB.

        Raises:
          FrameError: not uint8 RGB, or of an impossible shape.
        """
        checked = check_pixels(pixels)
        try:
            height, width = smart_resize(checked.shape[0], checked.shape[1], self._preprocess)
        except ValueError as error:
            raise FrameError(f"This frame cannot be resized: {error}") from None
        tokens = height * width // self._preprocess.factor**2
        if tokens > self._max_visual_tokens:  # a strip one token high cannot shrink further
            raise FrameError(
                f"A frame of {checked.shape[1]}x{checked.shape[0]} would become {tokens} visual tokens, "
                f"at most {self._max_visual_tokens} are possible",
                hint="Crop the picture to a less extreme shape",
            )
        return resize_frame(checked, self._preprocess)

    def patches(self, resized: np.ndarray) -> np.ndarray:
        """The vision graph's input for a resized frame: (P, 3 * patch_size**2) float32."""
        return patchify(resized, self._preprocess)

    def encode(self, resized: np.ndarray, patches: np.ndarray) -> FrameTokens:
        """Visual tokens of a resized frame, given its patches. Cost: one run of the vision graph."""
        rows, columns = grid_of(resized.shape[0], resized.shape[1], self._preprocess)
        embeds = self._backend.encode(patches, rows, columns)
        merge = self._preprocess.merge_size
        return FrameTokens(embeds, rows // merge, columns // merge)

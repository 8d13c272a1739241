"""A camera frame to visual tokens: preprocessing and the vision graph.

Owns which frames are taken. Knows neither what the graph needs beside patches nor what becomes of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.backends.base import Backend
from edge.contract import Manifest
from edge.decoder import FrameTokens
from edge.device_frames import FrameOnDevice
from edge.errors import FrameError
from edge.frames import check_frame
from edge.preprocess import grid_of, patchify, resize_frame, smart_resize


@dataclass(frozen=True)
class Picture:
    """A frame at the model's size; on a device it is resized when it is cut into patches.

    Attributes:
      pixels: (H, W, 3) uint8 RGB, or the frame on the device as it came.
      shape: (H, W, 3) of the model's size.
    """

    pixels: np.ndarray | FrameOnDevice
    shape: tuple[int, ...]


class VisionEncoder:
    """Encodes frames of any size with one bundle's vision tower."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self._preprocess = manifest.preprocess
        self._max_visual_tokens = manifest.max_visual_tokens
        self._backend = backend

    def resize(self, pixels: object) -> Picture:
        """The frame at the model's size.

        Args:
          pixels: (H, W, 3) uint8 RGB: an array of numpy, or anything with DLPack or the CUDA array interface; or an
            `Nv12Frame` of such on a GPU. What is on a GPU stays there.

        Raises:
          FrameError: none of these, or of an impossible shape, or on a GPU that the backend does not use.
        """
        checked = check_frame(pixels)
        if isinstance(checked, FrameOnDevice) and not hasattr(self._backend, "patches_of_frame"):
            raise FrameError(
                "A frame should be in the host's memory for this backend, found one on a GPU",
                hint="Use the backend cuda or tensorrt, or copy the frame to a numpy array",
            )
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
        if isinstance(checked, FrameOnDevice):
            return Picture(checked, (height, width, 3))
        resized = resize_frame(checked, self._preprocess)
        return Picture(resized, resized.shape)

    def patches(self, resized: Picture) -> Any:
        """The vision graph's input for a resized frame: (P, 3 * patch_size**2) float32, where the frame is."""
        if isinstance(resized.pixels, FrameOnDevice):
            backend: Any = self._backend
            return backend.patches_of_frame(resized.pixels, resized.shape[:2], self._preprocess)
        return patchify(resized.pixels, self._preprocess)

    def encode(self, resized: Picture, patches: Any) -> FrameTokens:
        """Visual tokens of a resized frame, given its patches. Cost: one run of the vision graph."""
        rows, columns = grid_of(resized.shape[0], resized.shape[1], self._preprocess)
        embeds = self._backend.encode(patches, rows, columns)
        merge = self._preprocess.merge_size
        return FrameTokens(embeds, rows // merge, columns // merge)

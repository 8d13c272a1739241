"""Frames in a GPU's memory: which forms are taken, and what is known of one that was.

Owns the check of a frame's planes. Never touches the memory, and does not know which backend will read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.errors import FrameError, KernelError
from edge.gpu_arrays import DeviceArray, device_array


@dataclass(frozen=True)
class FrameOnDevice:
    """A checked frame in a GPU's memory.

    Attributes:
      plane: (H, W, 3) uint8 RGB, or with `chroma` the luma plane (H, W) of an NV12 frame; rows in one piece.
      chroma: (H / 2, W / 2, 2) uint8, rows in one piece. full_range, bt709: of its colours.
    """

    plane: DeviceArray
    chroma: DeviceArray | None = None
    full_range: bool = False
    bt709: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the picture: (H, W, 3)."""
        return (self.plane.shape[0], self.plane.shape[1], 3)


def rgb_on_device(frame: object) -> FrameOnDevice:
    """An RGB frame as the kernels read it; nothing is copied.

    Raises:
      FrameError: its memory is not a GPU's, or it has another dtype, shape or order of bytes.
    """
    array = _on_gpu(frame, "frame")
    check_form(array.dtype, array.shape)
    return FrameOnDevice(_with_whole_rows(array, "frame"))


def check_form(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Refuse what is not RGB.

    Raises:
      FrameError: another dtype, another shape, or no pixels.
    """
    if dtype != np.uint8:
        raise FrameError(
            f"A frame should be uint8, found {dtype}", hint="Scale to 0..255 and use `frame.astype(numpy.uint8)`"
        )
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise FrameError(
            f"A frame should be RGB of shape (height, width, 3), found {shape}",
            hint="Convert grey or alpha pictures to three channels first",
        )


def _on_gpu(plane: object, name: str) -> DeviceArray:
    try:
        array = device_array(plane, name)
    except KernelError as error:
        raise FrameError(f"A frame cannot be taken from its GPU: {error.message}") from None
    if not array.pointer and 0 not in array.shape:
        raise FrameError(f"A frame cannot be taken from its GPU: {name}: its address is null")
    return array


def _with_whole_rows(array: DeviceArray, name: str) -> DeviceArray:
    channels = array.shape[2] if len(array.shape) == 3 else 1
    packed = array.strides[1:] == ((channels, 1) if len(array.shape) == 3 else (1,))
    if not packed or array.strides[0] < array.shape[1] * channels:
        raise FrameError(
            f"The {name} on a GPU should have its rows in one piece, one below the other; found strides {array.strides}"
        )
    return array

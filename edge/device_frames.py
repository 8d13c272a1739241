"""Frames in a GPU's memory: which forms are taken, and what is known of one that was.

Owns the check of a frame's planes. Never touches the memory, and does not know which backend will read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge.errors import FrameError, KernelError
from edge.gpu_arrays import DeviceArray, device_array


@dataclass(frozen=True)
class Nv12Frame:
    """A frame as video decoders and cameras leave it on a GPU: brightness of each pixel, colour of each 2x2 of them.

    Attributes:
      luma: (H, W) or (H, W, 1) uint8, H and W even. chroma: (H / 2, W / 2, 2) uint8, U before V, or the same memory as
        (H / 2, W). Anything with DLPack or the CUDA array interface, on a GPU; rows may be further apart than they are
        long.
      full_range: whether values use 0 to 255; else 16 to 235 for luma and 16 to 240 for chroma, as in most videos.
      bt709: whether colours are those of BT.709, as in most HD videos; else those of BT.601.
    """

    luma: Any
    chroma: Any
    full_range: bool = False
    bt709: bool = False


@dataclass(frozen=True)
class FrameOnDevice:
    """A checked frame in a GPU's memory.

    Attributes:
      plane: (H, W, 3) uint8 RGB, or with `chroma` the luma plane (H, W) of an NV12 frame; rows in one piece.
      chroma: (H / 2, W / 2, 2) uint8, rows in one piece. full_range, bt709: see `Nv12Frame`.
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


def nv12_on_device(frame: Nv12Frame) -> FrameOnDevice:
    """An NV12 frame as the kernels read it; nothing is copied.

    Raises:
      FrameError: as `rgb_on_device`, or the planes do not fit each other.
    """
    luma, chroma = _on_gpu(frame.luma, "luma plane"), _on_gpu(frame.chroma, "chroma plane")
    if luma.shape[2:] == (1,):
        luma = replace(luma, shape=luma.shape[:2], strides=luma.strides[:2])
    height, width = luma.shape if len(luma.shape) == 2 else (0, 0)
    if len(chroma.shape) == 2 and chroma.shape[1] == width:  # pairs, written one number behind the other
        row, step = chroma.strides
        chroma = replace(chroma, shape=(chroma.shape[0], width // 2, 2), strides=(row, 2 * step, step))
    fits = min(height, width) > 0 and not height % 2 and not width % 2
    if not fits or chroma.shape != (height // 2, width // 2, 2) or {luma.dtype, chroma.dtype} != {np.dtype(np.uint8)}:
        raise FrameError(
            "An NV12 frame should have a luma plane (height, width) with even sides and a chroma plane (height / 2, "
            f"width / 2, 2), both uint8; found {luma.dtype} {luma.shape} and {chroma.dtype} {chroma.shape}"
        )
    planes = _with_whole_rows(luma, "luma plane"), _with_whole_rows(chroma, "chroma plane")
    return FrameOnDevice(*planes, frame.full_range, frame.bt709)


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
    if isinstance(plane, np.ndarray):
        raise FrameError(
            f"The {name} of an NV12 frame should be on a GPU, found an array of numpy",
            hint="Convert it with `cv2.cvtColorTwoPlane(luma, chroma, cv2.COLOR_YUV2RGB_NV12)`",
        )
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

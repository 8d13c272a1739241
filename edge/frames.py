"""Frames and the hand-over of the newest one between two threads.

Owns the `Frame` record and the one-place mailbox. Does not know where frames come from nor which turn takes them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from edge.device_frames import FrameOnDevice, Nv12Frame, check_form, nv12_on_device, rgb_on_device
from edge.errors import FrameError

_DLPACK_CPU = 1


@dataclass(frozen=True)
class Frame:
    """One picture of the stream.

    Attributes:
      pixels: (H, W, 3) uint8 RGB. Owned by the frame; nobody writes to it after it is made.
      media_time_s: stream time of the picture in seconds, 0 at the stream's first frame.
      captured_ns: monotonic time at which it arrived; 0 where that means nothing (files played fast).
    """

    pixels: np.ndarray
    media_time_s: float
    captured_ns: int = 0


def check_frame(frame: object) -> np.ndarray | FrameOnDevice:
    """Return a frame of whatever library as an array of numpy, or as one on a device; nothing is copied.

    Args:
      frame: an array of numpy, anything with DLPack or the CUDA array interface, or an `Nv12Frame` of such.

    Raises:
      FrameError: none of these, another dtype, another shape, or no pixels.
    """
    if isinstance(frame, Nv12Frame):
        return nv12_on_device(frame)
    if isinstance(frame, np.ndarray):
        return check_pixels(frame)
    if not hasattr(frame, "__cuda_array_interface__"):
        if not hasattr(frame, "__dlpack__") or not hasattr(frame, "__dlpack_device__"):
            return check_pixels(frame)  # says what it is
        if int(frame.__dlpack_device__()[0]) == _DLPACK_CPU:
            return check_pixels(np.from_dlpack(frame))  # type: ignore[arg-type]
    return rgb_on_device(frame)


def check_pixels(pixels: object) -> np.ndarray:
    """Return `pixels` if it is a (H, W, 3) uint8 array, else say what it is.

    Raises:
      FrameError: not an array, another dtype, another shape, or no pixels.
    """
    if not isinstance(pixels, np.ndarray):
        raise FrameError(f"A frame should be a numpy array, found {type(pixels).__name__}")
    check_form(pixels.dtype, pixels.shape)
    return pixels


class LatestFrame:
    """A mailbox that holds one frame: the newest wins, and what nobody took is counted as dropped."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._frame: Frame | None = None
        self._closed = False
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Replace whatever is waiting."""
        with self._condition:
            if self._frame is not None:
                self.dropped += 1
            self._frame = frame
            self._condition.notify_all()

    def close(self) -> None:
        """No frame will follow; a waiting `take` returns at once."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def take(self, timeout_s: float) -> Frame | None:
        """Remove and return the waiting frame; None after `timeout_s`, or when closed and empty."""
        with self._condition:
            self._condition.wait_for(lambda: self._frame is not None or self._closed, timeout_s)
            frame, self._frame = self._frame, None
            return frame

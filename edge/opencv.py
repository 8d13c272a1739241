"""The way to OpenCV: imported late, kept quiet, its errors mapped. Does not know who reads and who writes."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from edge.errors import SourceError


def load_opencv() -> Any:
    """The `cv2` module, with its and FFmpeg's own messages off: those go to stderr and show passwords in addresses.

    Raises:
      SourceError: OpenCV is not installed, or its libraries do not load.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once, when FFmpeg is first used
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise SourceError(
            f"Video needs OpenCV, which does not load: {error}",
            hint="Install it with `pip install opencv-python-headless`",
        ) from error
    logging = getattr(getattr(cv2, "utils", None), "logging", None)
    if logging is not None:
        logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    return cv2


def has_gstreamer(cv2: Any) -> bool:
    """Whether this OpenCV was built with GStreamer; wheels are not, the one of a Jetson is."""
    return re.search(r"GStreamer:\s*YES", cv2.getBuildInformation()) is not None


def has_ffmpeg(cv2: Any) -> bool:
    """Whether this OpenCV was built with FFmpeg; wheels are, a distribution's may have GStreamer alone."""
    return re.search(r"FFMPEG:\s*YES", cv2.getBuildInformation()) is not None


def rgb_from_opencv(cv2: Any, image: np.ndarray) -> np.ndarray:
    """A new (H, W, 3) RGB picture from what OpenCV decoded: BGR, BGRA or grey."""
    if image.ndim == 2 or image.shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGB if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def reported_fps(value: float) -> float | None:
    """The frame rate that a capture reports, or None where it is no rate."""
    return float(value) if 0.0 < value <= 1000.0 else None  # also false for NaN

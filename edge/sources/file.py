"""A video file, read picture by picture. Owns its media times; does not pace itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge.errors import SourceError
from edge.frames import Frame
from edge.opencv import load_opencv, reported_fps, rgb_from_opencv
from edge.sources.base import Ending, SourceInfo

_ASSUMED_FPS = 25.0
_FAILURES_AT_END = 100
_READ_BEFORE_S = 1.0  # pictures read before the one skipped to, since it is only known once it is there


class MediaTimeline:
    """Media times from a container's timestamps: from 0, strictly rising.

    A timestamp that is missing (always 0), repeated or going back is replaced by one frame after the last.
    """

    def __init__(self, fps: float | None) -> None:
        self.frame_s = 1.0 / (fps or _ASSUMED_FPS)
        self._origin_ms: float | None = None
        self._last_s = 0.0

    def media_time_s(self, position_ms: float) -> float:
        """Media time of the next frame, whose container timestamp is `position_ms`.

        Only differences to the first timestamp count: older OpenCV reports the time of the frame after this one.
        """
        if self._origin_ms is None:
            self._origin_ms = position_ms
            return 0.0
        time_s = (position_ms - self._origin_ms) / 1e3
        self._last_s = time_s if time_s > self._last_s else self._last_s + self.frame_s
        return self._last_s


class VideoFileSource:
    """Frames of a video file.

    The size may change midway: each frame carries its own, as far as OpenCV tells. With most codecs OpenCV scales
    later pictures to the size of the first.
    """

    live = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.ending: Ending | None = None
        self._path = path
        self._cv2: Any = None
        self._capture: Any = None
        self._first: Frame | None = None
        self._frames_read = 0
        self._newest_s = 0.0
        self._frames_announced: int | None = None

    def open(self) -> SourceInfo:
        """See `Source.open`."""
        self._cv2 = load_opencv()
        _check_readable(self._path)
        self._capture = self._cv2.VideoCapture(str(self._path))
        if not self._capture.isOpened():
            self.close()
            raise SourceError(
                f"Video `{self._path}` does not open: its {self._path.stat().st_size} bytes are no video OpenCV reads",
                hint="Check that it plays elsewhere and was copied whole, or convert it: `ffmpeg -i VIDEO out.mp4`",
            )
        fps = reported_fps(self._capture.get(self._cv2.CAP_PROP_FPS))
        frames = self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)
        self._frames_announced = int(frames) if 0 < frames < 1e9 else None
        self._timeline = MediaTimeline(fps)
        self._first = self._next()
        if self._first is None:
            announced = self._frames_announced or 0
            self.close()
            raise SourceError(
                f"Video `{self._path}` holds no picture: it announces {announced} frames, 0 could be read",
                hint="Check that it plays elsewhere and was copied whole",
            )
        height, width = self._first.pixels.shape[:2]
        duration_s = self._frames_announced / fps if self._frames_announced and fps else None
        return SourceInfo(width, height, fps, duration_s)

    def read(self) -> Frame | None:
        """See `Source.read`."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        frame = self._next()
        if frame is None:
            self.ending = Ending(self._frames_read, self._frames_announced)
        return frame

    def skip_to(self, media_time_s: float) -> int:
        """See `Source`. Saves what comes after decoding; videos cannot be left out undecoded, so a slow one stays late.

        Seeking would save more, but lands where it likes in files whose index is missing or wrong.
        """
        if self._capture is None or self._first is not None:
            return 0
        until_s = media_time_s - max(_READ_BEFORE_S, 2 * self._timeline.frame_s)
        skipped = 0
        while self._newest_s < until_s and self._grab():
            self._note_time()
            skipped += 1
        return skipped

    def close(self) -> None:
        """See `Source.close`."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _next(self) -> Frame | None:
        if self._capture is None:
            return None
        image = self._decode()
        if image is None:
            return None
        self._note_time()
        return Frame(rgb_from_opencv(self._cv2, image), self._newest_s)

    def _note_time(self) -> None:
        self._frames_read += 1
        self._newest_s = self._timeline.media_time_s(self._capture.get(self._cv2.CAP_PROP_POS_MSEC))

    def _grab(self) -> bool:
        """Decode the next picture without taking it."""
        try:
            return bool(self._capture.grab())
        except self._cv2.error as error:
            raise SourceError(f"Video `{self._path}` broke off after {self._frames_read} frames: {error}") from error

    def _decode(self) -> np.ndarray | None:
        """The next picture as OpenCV gives it. A damaged one fails as the end does, but only the end fails again."""
        try:
            for _ in range(_FAILURES_AT_END):
                ok, image = self._capture.read()
                if ok and image is not None:
                    return image
        except self._cv2.error as error:
            raise SourceError(f"Video `{self._path}` broke off after {self._frames_read} frames: {error}") from error
        return None


def _check_readable(path: Path) -> None:
    """OpenCV reports every problem as 'not opened'; the system knows which it is."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise SourceError(f"Video `{path}` cannot be read: {error.strerror}") from error

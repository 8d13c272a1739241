"""A live camera through OpenCV: one reading thread, the newest frame wins, timeouts that fire.

Owns the reading thread. OpenCV may block inside a call for as long as it likes: the reader of this class waits on a
mailbox instead and gives up in time; a thread that hangs is left behind as a daemon. Never reconnects.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from edge.clock import Clock
from edge.errors import SourceError
from edge.frames import Frame, LatestFrame
from edge.masking import mask_secrets
from edge.opencv import has_ffmpeg, has_gstreamer, load_opencv, reported_fps, rgb_from_opencv
from edge.sources.address import SourceUrl
from edge.sources.base import Ending, SourceInfo

OPEN_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 5.0
_CLOSE_WAIT_S = 0.5
_AT_ONCE_NS = 2_000_000
_FAILURES_AT_END = 20
_RETRY_S = 0.01
_APPSINK = "appsink drop=true max-buffers=1 sync=false"
_CSI_PIPELINE = (
    "nvarguscamerasrc sensor-id={index} ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! nvvidconv"
    " ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! " + _APPSINK
)

OpenCapture = Callable[[Any], Any]
"""From the `cv2` module to a `cv2.VideoCapture`; runs in the reading thread."""


class CameraSource:
    """A live stream. Media time is the arrival time since the first frame, on the monotonic clock."""

    live = True

    def __init__(
        self,
        name: str,
        open_capture: OpenCapture,
        *,
        clock: Clock,
        may_end: bool = False,
        tells_fps: bool = True,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """`may_end`: the stream may end well (a pipeline that plays a file); else an end is a loss.

        `tells_fps`: the rate that OpenCV reports is the camera's and not a guess.
        """
        self.name = name
        self.ending: Ending | None = None
        self._open_capture = open_capture
        self._clock = clock
        self._may_end = may_end
        self._tells_fps = tells_fps
        self._open_timeout_s = open_timeout_s
        self._read_timeout_s = read_timeout_s
        self._reader: _Reader | None = None
        self._first: Frame | None = None

    @property
    def dropped_frames(self) -> int:
        """Frames that arrived and were replaced before anybody read them."""
        return self._reader.mailbox.dropped if self._reader else 0

    def open(self) -> SourceInfo:
        """See `Source.open`; waits up to the open timeout for the first picture."""
        self._reader = reader = _Reader(load_opencv(), self._open_capture, self._clock)
        reader.start()
        self._first = reader.mailbox.take(self._open_timeout_s)
        if self._first is None:
            problem, hint = reader.problem, reader.hint
            self.close()
            if problem is None:
                problem = f"gave no picture within {self._open_timeout_s:.1f} s"
            raise SourceError(
                f"Source `{self.name}` {problem}",
                hint=hint or "Check that the camera is on, its address and password, and that nobody else uses it",
            )
        height, width = self._first.pixels.shape[:2]
        return SourceInfo(width, height, reader.fps if self._tells_fps else None)

    def read(self) -> Frame | None:
        """See `Source.read`; waits until the read timeout has passed since the last frame arrived."""
        reader = self._reader
        if reader is None or reader.stopping:
            return None
        if self._first is not None:
            frame, self._first = self._first, None
            return frame
        silent_s = (self._clock.monotonic_ns() - reader.last_arrival_ns) / 1e9
        newest = reader.mailbox.take(max(0.0, self._read_timeout_s - silent_s))
        if newest is not None:
            return newest
        if reader.stopping:
            return None
        if not reader.mailbox.closed:
            raise SourceError(
                f"Source `{self.name}` sent no frame for {self._read_timeout_s:.1f} s, after {reader.frames} frames",
                hint="Check the camera and its network, then start again",
            )
        self.ending = Ending(reader.frames)
        if self._may_end and reader.ended:
            return None
        raise SourceError(
            f"Source `{self.name}` {reader.problem or 'stopped'} after {reader.frames} frames",
            hint="Check the camera and its network, then start again",
        )

    def close(self) -> None:
        """See `Source.close`; a reading thread that hangs inside OpenCV is left behind."""
        if self._reader is not None:
            self._reader.stop()


class _Reader:
    """The reading thread of one opening and what it leaves for others."""

    def __init__(self, cv2: Any, open_capture: OpenCapture, clock: Clock) -> None:
        self.mailbox = LatestFrame()
        self.problem: str | None = None
        self.hint: str | None = None
        self.ended = False
        self.fps: float | None = None
        self.frames = 0
        self.last_arrival_ns = clock.monotonic_ns()
        self._cv2 = cv2
        self._open_capture = open_capture
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.mailbox.close()
        self._thread.join(_CLOSE_WAIT_S)

    def _run(self) -> None:
        capture = None
        try:
            capture = self._open_capture(self._cv2)
            if capture.isOpened():
                self.fps = reported_fps(capture.get(self._cv2.CAP_PROP_FPS))
                self._read_all(capture)
            else:
                self.problem = "does not open"
        except SourceError as error:
            self.problem, self.hint = error.message, error.hint
        except self._cv2.error as error:
            self.problem = f"failed inside OpenCV ({mask_secrets(str(error)).strip()})"
        except Exception as error:  # noqa: BLE001 - a thread would print its traceback; `open` and `read` tell this
            self.problem = f"failed ({type(error).__name__}: {mask_secrets(str(error)).strip()})"
        finally:
            if capture is not None:
                with contextlib.suppress(Exception):  # it is over either way
                    capture.release()
            self.mailbox.close()

    def _read_all(self, capture: Any) -> None:
        first_ns: int | None = None
        quick_failures = 0
        while not self._stop.is_set():
            asked_ns = self._clock.monotonic_ns()
            ok, image = capture.read()
            if not ok or image is None:
                # A damaged picture fails too, and the next may be whole; a stream that is over fails at once, always.
                at_once = self._clock.monotonic_ns() - asked_ns < _AT_ONCE_NS
                quick_failures = quick_failures + 1 if at_once else 0
                if quick_failures == _FAILURES_AT_END:
                    self.problem, self.ended = "closed the stream", True
                    return
                self._stop.wait(_RETRY_S)
                continue
            quick_failures = 0
            now_ns = self._clock.monotonic_ns()
            first_ns = now_ns if first_ns is None else first_ns
            self.frames += 1
            self.last_arrival_ns = now_ns
            self.mailbox.put(Frame(rgb_from_opencv(self._cv2, image), (now_ns - first_ns) / 1e9, now_ns))


def url_camera(
    url: SourceUrl, *, clock: Clock, open_timeout_s: float = OPEN_TIMEOUT_S, read_timeout_s: float = READ_TIMEOUT_S
) -> CameraSource:
    """A camera at an `rtsp://` or `http://` address."""

    def open_capture(cv2: Any) -> Any:
        if not has_ffmpeg(cv2):
            return cv2.VideoCapture(url.reveal())
        # One second above our own timeouts: ours decide, these free the thread that hangs.
        limits = [
            *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, int(open_timeout_s * 1e3) + 1000),
            *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, int(read_timeout_s * 1e3) + 1000),
        ]
        capture = cv2.VideoCapture(url.reveal(), cv2.CAP_FFMPEG, limits)
        if capture.isOpened() and 0 < (frames := capture.get(cv2.CAP_PROP_FRAME_COUNT)) < 1e9:
            capture.release()
            raise SourceError(
                f"is a recording of {int(frames)} frames, not a live stream",
                hint="Download it and give the file's path",
            )
        return capture

    return CameraSource(
        str(url),
        open_capture,
        clock=clock,
        tells_fps=url.reveal().lower().startswith("rtsp"),  # for MJPEG, FFmpeg says 25 whatever comes
        open_timeout_s=open_timeout_s,
        read_timeout_s=read_timeout_s,
    )


def device_camera(name: str, device: int | str, *, clock: Clock) -> CameraSource:
    """A camera of this machine, by its V4L2 number or path."""

    def open_capture(cv2: Any) -> Any:
        capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        return capture

    return CameraSource(name, open_capture, clock=clock)


def pipeline_camera(name: str, pipeline: SourceUrl, *, clock: Clock) -> CameraSource:
    """A GStreamer pipeline; an `appsink` is added where it has none.

    Raises:
      SourceError: this OpenCV has no GStreamer.
    """
    if not has_gstreamer(load_opencv()):
        raise SourceError(
            f"Source `{name}` needs an OpenCV with GStreamer; the installed one has none",
            hint="Use the system's OpenCV: on a Jetson uninstall the `opencv-python*` packages that hide it",
        )
    text = pipeline.reveal()
    if "appsink" not in text:
        text = f"{text} ! videoconvert ! video/x-raw,format=BGR ! {_APPSINK}"
    return CameraSource(name, lambda cv2: cv2.VideoCapture(text, cv2.CAP_GSTREAMER), clock=clock, may_end=True)


def csi_camera(index: int, *, clock: Clock) -> CameraSource:
    """A CSI camera of a Jetson, through its GStreamer elements."""
    return pipeline_camera(f"csi:{index}", SourceUrl(_CSI_PIPELINE.format(index=index)), clock=clock)

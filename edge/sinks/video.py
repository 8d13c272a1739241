"""The stream as a video to look at: the picture, below it what the model decides and says.

Owns the file's time line: a constant frame rate whose frame n shows stream time n / fps. A picture stays until the
next one comes. The file becomes readable when it is closed; of a killed process the text outputs remain.
"""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from edge.errors import OutputError, SourceError
from edge.events import (
    QUESTION_ASKED,
    QUESTION_CLOSED,
    RESPONSE_COMPLETED,
    RESPONSE_CREATED,
    RESPONSE_DELTA,
    TURN_STATE,
    Event,
)
from edge.frames import Frame
from edge.opencv import load_opencv
from edge.sinks.caption_bar import BACKGROUND, STRIP_S, BarContent, CaptionBar
from edge.sinks.captions import reading_time_s
from edge.sinks.files import FilePlace

VIDEO_FPS = 10
_MAX_FILL_S = 60  # a longer gap between two pictures is cut out
_MIN_WIDTH, _MAX_WIDTH, _MAX_HEIGHT = 640, 1280, 640
_RESERVE_BYTES = 16 << 20  # kept free, so that the file's index still fits when the disk fills up
_CODECS = ("avc1", "mp4v")  # browsers play the first, every OpenCV can write the second


class VideoSink:
    """A captioned mp4."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._place = FilePlace(path)
        self._cv2: Any = None
        self._writer: Any = None
        self._bar: CaptionBar | None = None
        self._picture: np.ndarray | None = None  # (H, W, 3) BGR, as large as the video shows it
        self._frames_written = 0
        self._end_s = 0.0
        self._captions = _Captions()

    def open(self) -> None:
        """See `Sink.open`."""
        if self._cv2 is None:
            self._place.claim()
            try:
                self._cv2 = load_opencv()
            except SourceError as error:
                raise OutputError(f"Output `{self._path}`: {error.message}", hint=error.hint) from error
            self._check_space()

    def handle(self, event: Event) -> None:
        """See `Sink.handle`."""
        self._captions.note(event)
        if "media_time" in event.fields:
            self._end_s = max(self._end_s, event.fields["media_time"]["end_s"])

    def handle_frame(self, frame: Frame) -> None:
        """Show `frame` from its media time on."""
        try:
            if self._writer is None:
                self._start(frame)
            self._fill_until(frame.media_time_s)
            self._picture = self._fitted(np.ascontiguousarray(frame.pixels))
        except self._cv2.error as error:
            raise OutputError(f"Output `{self._path}` failed inside OpenCV: {error}") from error
        self._end_s = max(self._end_s, frame.media_time_s)

    def close(self) -> None:
        """See `Sink.close`; the last picture stays until its turn's second is over."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._write_until(writer, self._end_s)
            writer.release()
        self._place.give_back()

    def _start(self, frame: Frame) -> None:
        height, width = frame.pixels.shape[:2]
        scale = min(max(1.0, _MIN_WIDTH / width), _MAX_WIDTH / width, _MAX_HEIGHT / height)
        self._picture_width = max(_MIN_WIDTH, round(width * scale) // 2 * 2)
        self._picture_height = max(2, round(height * scale) // 2 * 2)
        self._bar = CaptionBar(self._picture_width)
        size = (self._picture_width, self._picture_height + self._bar.height)
        for codec in _CODECS:
            fourcc = self._cv2.VideoWriter_fourcc(*codec)
            writer = self._cv2.VideoWriter(str(self._path), fourcc, float(VIDEO_FPS), size)
            if writer.isOpened():
                self._writer = writer
                return
            writer.release()
        raise OutputError(
            f"Output `{self._path}` cannot be written: OpenCV opens no {size[0]}x{size[1]} video there",
            hint="Give a path on a disk with free space; captions (.vtt) and events (.jsonl) need no OpenCV",
        )

    def _fill_until(self, time_s: float) -> None:
        behind_s = time_s - self._frames_written / VIDEO_FPS
        if behind_s > _MAX_FILL_S:
            self._frames_written = int(time_s * VIDEO_FPS)
        self._write_until(self._writer, time_s)

    def _write_until(self, writer: Any, time_s: float) -> None:
        """Write the frames whose time comes before `time_s`."""
        while self._picture is not None and self._frames_written + 1e-6 < time_s * VIDEO_FPS:
            if self._frames_written % (10 * VIDEO_FPS) == 0:
                self._check_space()
            assert self._bar is not None
            content = self._captions.content(self._frames_written / VIDEO_FPS)
            bar = self._bar.render(content)[:, :, ::-1]
            writer.write(np.concatenate([self._picture, bar]))
            self._frames_written += 1

    def _fitted(self, pixels: np.ndarray) -> np.ndarray:
        """`pixels` as BGR in the middle of the video's picture area, its shape kept."""
        height, width = pixels.shape[:2]
        scale = min(self._picture_width / width, self._picture_height / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        way = self._cv2.INTER_AREA if scale < 1 else self._cv2.INTER_CUBIC
        scaled = self._cv2.resize(self._cv2.cvtColor(pixels, self._cv2.COLOR_RGB2BGR), size, interpolation=way)
        area = np.full((self._picture_height, self._picture_width, 3), BACKGROUND[::-1], np.uint8)
        top, left = (self._picture_height - size[1]) // 2, (self._picture_width - size[0]) // 2
        area[top : top + size[1], left : left + size[0]] = scaled
        return area

    def _check_space(self) -> None:
        """OpenCV does not report a full disk, so look before it happens."""
        free_bytes = shutil.disk_usage(self._path.parent).free
        if free_bytes < _RESERVE_BYTES:
            raise OutputError(
                f"Output `{self._path}` stops: {free_bytes / 2**20:.1f} MiB are free on its disk,"
                f" {_RESERVE_BYTES / 2**20:.0f} MiB are needed",
                hint="Free some space, or give a path on another disk",
            )


class _Captions:
    """What there is to read at each moment, from the events so far."""

    def __init__(self) -> None:
        self._state = ""
        self._states: deque[tuple[int, str]] = deque(maxlen=STRIP_S)  # (second, state) of the last changes
        self._question = ""
        self._reply = ""
        self._reply_from_s = 0.0

    def note(self, event: Event) -> None:
        """Take note of what happened."""
        if event.type == QUESTION_ASKED:
            self._question = event.fields["text"]
        elif event.type == QUESTION_CLOSED and event.fields["text"] == self._question:
            self._question = ""
        elif event.type == RESPONSE_CREATED:
            self._reply, self._reply_from_s = "", event.fields["media_time"]["start_s"]
            self._change("response", event)
        elif event.type == RESPONSE_DELTA:
            self._reply += event.fields["text"]
        elif event.type == RESPONSE_COMPLETED:
            self._reply = event.fields["text"]
        elif event.type == TURN_STATE:
            self._change(event.fields["state"], event)

    def content(self, time_s: float) -> BarContent:
        """What the bar shows at stream time `time_s`."""
        fades = time_s > self._reply_from_s + reading_time_s(self._reply)
        second = int(time_s)
        return BarContent(second, self._state, self._question, self._reply.strip(), fades, self._strip(second))

    def _change(self, state: str, event: Event) -> None:
        self._state = state
        second = int(event.fields["media_time"]["start_s"])
        if self._states and self._states[-1][0] == second:
            self._states.pop()
        self._states.append((second, state))

    def _strip(self, now: int) -> tuple[str, ...]:
        strip = []
        changes = list(self._states)
        state = ""
        for second in range(max(0, now - STRIP_S + 1), now + 1):
            while changes and changes[0][0] <= second:
                state = changes.pop(0)[1]
            strip.append(state)
        return tuple(strip)

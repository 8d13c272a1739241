"""Small streams for tests: drawn frames, sources from lists, a session that follows a script, a sink that remembers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from edge.errors import QuestionError
from edge.events import Event
from edge.frames import Frame
from edge.opencv import load_opencv
from edge.sources.base import Ending, SourceInfo
from edge.turn import Turn, TurnState


class FastClock:
    """The machine's monotonic clock, `speed` times faster: an hour of a stream passes in seconds."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._start_ns = time.monotonic_ns()

    def monotonic_ns(self) -> int:
        return round((time.monotonic_ns() - self._start_ns) * self._speed) + 1

    def wall_ns(self) -> int:
        return self.monotonic_ns()

    def sleep_until_ns(self, deadline_ns: int) -> None:
        remaining_ns = (deadline_ns - self.monotonic_ns()) / self._speed
        if remaining_ns > 0:
            time.sleep(remaining_ns / 1e9)


def picture(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A flat picture whose red channel is `value`."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = value
    return pixels


class ListSource:
    """Frames from a list, or an error in their place."""

    def __init__(self, items: Iterable[Frame | Exception], *, name: str = "list", live: bool = False) -> None:
        self.name = name
        self.live = live
        self.ending: Ending | None = None
        self.closed = False
        self._items = iter(items)
        self._count = 0

    def open(self) -> SourceInfo:
        return SourceInfo(64, 48, None, None)

    def read(self) -> Frame | None:
        item = next(self._items, None)
        if isinstance(item, Exception):
            raise item
        if item is None:
            self.ending = Ending(self._count)
            return None
        self._count += 1
        return item

    def close(self) -> None:
        self.closed = True


def frames_at(fps: float, seconds: float) -> list[Frame]:
    """Frames at a steady rate from 0 to just before `seconds`."""
    return [Frame(picture(i % 256), i / fps) for i in range(int(np.ceil(seconds * fps)))]


class ScriptedSession:
    """Says what `replies` holds for a second, is silent otherwise, and remembers what it was given."""

    def __init__(
        self,
        replies: dict[int, str] | None = None,
        *,
        turn_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        fails_at: dict[int, Exception] | None = None,
        before_turn: Callable[[int], None] | None = None,
    ) -> None:
        self.replies = replies or {}
        self.turn_s = turn_s
        self.sleep = sleep
        self.fails_at = fails_at or {}
        self.before_turn = before_turn
        self.served: list[tuple[int, int]] = []  # (second, red value of its picture)
        self.asked: list[str] = []
        self.closed: list[str] = []
        self.thread_names: set[str] = set()
        self._waiting: list[str] = []

    def ask(self, text: str) -> int:
        if len(text) > 300:
            raise QuestionError(f"The question has {len(text)} characters, the window holds 300")
        self.asked.append(text)
        self._waiting.append(text)
        return len(self.asked)

    def close_question(self, question: int | str) -> str:
        if question not in self.asked or question in self.closed:
            raise QuestionError(f"No question `{question}` is open")
        self.closed.append(str(question))
        return str(question)

    def push(self, pixels: np.ndarray, t: int, on_text: Callable[[str], None] | None = None) -> Turn:
        self.thread_names.add(threading.current_thread().name)
        self.served.append((t, int(pixels[0, 0, 0])))
        if self.before_turn:
            self.before_turn(t)
        if t in self.fails_at:
            raise self.fails_at[t]
        if self.turn_s:
            self.sleep(self.turn_s)
        question, self._waiting = " ".join(self._waiting), []
        text = self.replies.get(t, "")
        for piece in text.split(" ") if text and on_text else []:
            on_text(f" {piece}")  # type: ignore[misc]
        state = TurnState.RESPONSE if text else TurnState.SILENCE
        return Turn(
            t,
            state,
            text,
            question=question,
            visual_tokens=16,
            kv_tokens=20 * len(self.served),
            timing_ms={"turn": 1.0},
        )


class RecordingSink:
    """Keeps every event."""

    name = "recording"

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def open(self) -> None:
        pass

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    def types(self) -> list[str]:
        return [event.type for event in self.events]

    def of(self, event_type: str) -> list[dict]:
        return [event.fields for event in self.events if event.type == event_type]


def write_video(path: Path, pictures: Iterable[np.ndarray], fps: float, codec: str = "mp4v") -> Path:
    """RGB pictures of one size as a video file, through OpenCV."""
    cv2 = load_opencv()
    writer = None
    for pixels in pictures:
        if writer is None:
            size = (pixels.shape[1], pixels.shape[0])
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size)
            assert writer.isOpened()
        writer.write(np.ascontiguousarray(pixels[:, :, ::-1]))
    assert writer is not None
    writer.release()
    return path

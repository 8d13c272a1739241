"""Sinks that show pictures: which pictures they get, and the thread that each of them works on.

Owns the rate of pictures, the queue before each such sink, and what is left out when one cannot keep up.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from edge.errors import OutputError
from edge.events import Event
from edge.frames import Frame

SHOWN_FPS = 10
"""Pictures a second that sinks get to see, at most."""

_FINISH_S = 10.0
_QUEUED_PICTURES = 8
_QUEUED_EVENTS = 1024


class Gallery:
    """Passes pictures on to the sinks that show them, at most `SHOWN_FPS` a second of the stream."""

    def __init__(self, viewers: Sequence[BackgroundSink]) -> None:
        self._viewers = viewers
        self._next_s = 0.0

    def show(self, frame: Frame) -> None:
        """Let every viewer see `frame`, unless they saw one a moment ago."""
        if self._viewers and frame.media_time_s + 1e-6 >= self._next_s:
            # From one grid point to the next, so that 29.97 fps gives ten pictures a second and not 9.99.
            self._next_s = (math.floor(frame.media_time_s * SHOWN_FPS + 1e-6) + 1) / SHOWN_FPS
            for viewer in self._viewers:
                viewer.show(frame)


class BackgroundSink:
    """A sink on a thread of its own, behind a short queue: its work never holds up a turn.

    When it cannot keep up in real time (`lossy`), pictures are left out; otherwise the caller waits. What is left out
    is warned of once.
    """

    def __init__(self, sink: Any, *, lossy: bool, on_warning: Callable[[str], None]) -> None:
        self.name = sink.name
        self._sink = sink
        self._lossy = lossy
        self._on_warning = on_warning
        self._changed = threading.Condition()
        self._queue: deque[Event | Frame] = deque()
        self._pictures = 0
        self._closing = self._started = self._over = False
        self._left_out = ""  # what, while nobody has been told yet
        self._warned: set[str] = set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)

    def open(self) -> None:
        """See `Sink.open`."""
        self._sink.open()
        self._thread.start()
        self._started = True

    def handle(self, event: Event) -> None:
        """Queue an event; raises what went wrong with earlier ones."""
        self._raise_failure()
        with self._changed:
            if len(self._queue) < _QUEUED_EVENTS:
                self._queue.append(event)
                self._changed.notify_all()
            else:
                self._left_out = "events"
        self._warn()

    def show(self, frame: Frame) -> None:
        """Queue a picture; what goes wrong is told by the next `handle`, since this may be another thread."""
        with self._changed:
            if not self._lossy:
                self._changed.wait_for(lambda: self._pictures < _QUEUED_PICTURES or self._over, _FINISH_S)
            if self._over:
                return
            if self._pictures < _QUEUED_PICTURES:
                self._queue.append(frame)
                self._pictures += 1
                self._changed.notify_all()
            else:
                self._left_out = self._left_out or "pictures"

    def close(self) -> None:
        """Let the thread work off its queue and finish the output."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self._started:
            self._sink.close()
            return
        if self._thread.is_alive():
            self._thread.join(_FINISH_S)
            if self._thread.is_alive():
                raise OutputError(f"Output `{self.name}` was not finished within {_FINISH_S:.0f} s")
        self._warn()
        self._raise_failure()

    def _warn(self) -> None:
        what, self._left_out = self._left_out, ""
        if what and what not in self._warned:
            self._warned.add(what)
            self._on_warning(f"Output `{self.name}` cannot keep up; {what} are left out of it")

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            try:
                while (item := self._next()) is not None:
                    if isinstance(item, Event):
                        self._sink.handle(item)
                    else:
                        self._sink.handle_frame(item)
            finally:
                self._sink.close()
        except BaseException as error:  # noqa: BLE001 - raised again where the run hands over the next event
            self._failure = error
        finally:
            with self._changed:
                self._over = True
                self._queue.clear()
                self._changed.notify_all()

    def _next(self) -> Event | Frame | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            item = self._queue.popleft()
            if isinstance(item, Frame):
                self._pictures -= 1
                self._changed.notify_all()
            return item

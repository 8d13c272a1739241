"""The thread that plays a source against the clock and keeps the pacer supplied.

Owns when a recorded picture is due, and what is left out of a recording that cannot be read as fast as it plays.
"""

from __future__ import annotations

import threading
from typing import Protocol

from edge.clock import Clock
from edge.frames import Frame
from edge.pacing import DueTurn, FramePacer, horizon_before
from edge.sources.base import Source

_NAP_NS = 20_000_000  # how long a wait may go on before it looks at `stop` again
_SHORT_NAP_NS = 1_000_000
_JOIN_S = 2.0
_MAY_LAG_S = 1.0  # a reader this far behind the clock leaves pictures out


class _Shows(Protocol):
    def show(self, frame: Frame) -> None: ...


class Feed:
    """One playing of a source. Everything but `start` and `finish` is for the run's own thread.

    Attributes:
      failure: what ended the thread, once it is over; None for the end of the source.
      behind_s: how far the newest picture of a recording was behind the clock when it could be read.
      skipped_frames: pictures of a recording left out, unread, to catch up.
    """

    def __init__(self, source: Source, pacer: FramePacer, clock: Clock, gallery: _Shows) -> None:
        self.failure: BaseException | None = None
        self.behind_s = 0.0
        self.skipped_frames = 0
        self._source = source
        self._pacer = pacer
        self._clock = clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._start_ns: int | None = None
        self._horizon_s: float | None = None  # all frames before it are known; None: whatever the clock says
        self._finished = False
        self._gallery = gallery
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def start(self) -> None:
        """Start to play."""
        self._thread.start()

    def finish(self) -> bool:
        """End the thread; False if it hangs in the source and was left behind."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
        return not self._thread.is_alive()

    def newest_due(self) -> tuple[DueTurn | None, bool]:
        """The newest turn whose time has come, and whether no frame will follow."""
        with self._lock:
            if self._start_ns is None:
                return None, self._finished
            stream_s = (self._clock.monotonic_ns() - self._start_ns) / 1e9
            if self._finished:
                stream_s = self._pacer.newest_media_time_s or 0.0
            elif self._horizon_s is not None:
                stream_s = min(stream_s, self._horizon_s)
            return self._pacer.newest_due(stream_s), self._finished

    def nap_until_ns(self) -> int:
        """When it is worth calling `newest_due` again, were nothing due now."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            next_ns = now_ns if self._start_ns is None else self._start_ns + self._pacer.next_second * 1_000_000_000
        return max(now_ns + _SHORT_NAP_NS, min(next_ns, now_ns + _NAP_NS))

    def time_ns_of(self, frame: Frame) -> int:
        """Monotonic time at which `frame` was there."""
        return frame.captured_ns or (self._start_ns or 0) + round(frame.media_time_s * 1e9)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                frame = self._source.read()
                if frame is None or not self._await(frame):
                    break
                with self._lock:
                    self._pacer.offer(frame)
                    if not self._source.live:
                        self._horizon_s = frame.media_time_s
                self._gallery.show(frame)
                self._catch_up(frame)
        except BaseException as error:  # noqa: BLE001 - raised again in the run's own thread
            self.failure = error
        finally:
            with self._lock:
                self._finished = True

    def _await(self, frame: Frame) -> bool:
        """Wait until `frame` is due; False when the run stops first."""
        now_ns = self._clock.monotonic_ns()
        if self._start_ns is None:
            self._start_ns = (frame.captured_ns or now_ns) - round(frame.media_time_s * 1e9)
        if self._source.live:
            return True
        with self._lock:
            self._horizon_s = horizon_before(frame)
        due_ns = self._start_ns + round(frame.media_time_s * 1e9)
        self.behind_s = max(0.0, (now_ns - due_ns) / 1e9)
        while now_ns < due_ns and not self._stop.is_set():
            self._clock.sleep_until_ns(min(due_ns, now_ns + _NAP_NS))
            now_ns = self._clock.monotonic_ns()
        return not self._stop.is_set()

    def _catch_up(self, frame: Frame) -> None:
        """Go on with the picture of the newest turn that is due, where the source can leave pictures out."""
        skip_to = getattr(self._source, "skip_to", None)
        if skip_to is None or self.behind_s <= _MAY_LAG_S:
            return
        schedule = self._pacer.schedule
        due_s = schedule.second(schedule.latest_index(frame.media_time_s + self.behind_s))
        if due_s > frame.media_time_s:
            self.skipped_frames += skip_to(float(due_s))

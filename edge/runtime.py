"""A stream from its source through the session to its outputs.

The only place that wires the parts, and, beside a camera's reading thread, the only one that makes threads: one that
plays the source against the clock, and one for each output whose work is heavy. The session stays on the caller's.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge.clock import Clock, SystemClock
from edge.errors import EdgeError, OutputError, QuestionError, UsageError
from edge.events import ERROR, FRAMES_DROPPED, SESSION_CREATED, SESSION_ENDED, SOURCE_STATE, Event, EventFactory
from edge.frames import Frame
from edge.narration import Narrator
from edge.outputs import Outputs, error_fields
from edge.pacing import DueTurn, FramePacer, TurnSchedule, horizon_before
from edge.sinks.base import Sink
from edge.sources.base import Ending, Source
from edge.summary import RunSummary
from edge.turn import Turn

SHOWN_FPS = 10
"""Pictures a second that sinks get to see, at most."""

_NAP_NS = 20_000_000  # how long a wait may go on before it looks at `stop` again
_SHORT_NAP_NS = 1_000_000
_DROP_REPORT_NS = 1_000_000_000
_JOIN_S = 2.0
_FINISH_S = 10.0
_QUEUED_PICTURES = 8
_QUEUED_EVENTS = 1024


class Session(Protocol):
    """What the runtime needs of a `StreamSession`."""

    def ask(self, text: str) -> None: ...

    def push(self, pixels: np.ndarray, t: int, on_text: Callable[[str], None] | None = None) -> Turn: ...


@dataclass(frozen=True)
class Question:
    """A question and the stream second from which it holds; it joins the first turn that is not before it."""

    at_s: float
    text: str


def run_stream(
    session: Session,
    source: Source,
    *,
    questions: Sequence[Question] = (),
    sinks: Sequence[Sink] = (),
    fps: float = 1.0,
    pace: str = "realtime",
    clock: Clock | None = None,
    stream_name: str = "stream",
    stop: Callable[[], bool] | threading.Event | None = None,
    max_turns: int | None = None,
    on_turn: Callable[[Turn], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    every_turn: bool = False,
) -> RunSummary:
    """Watch `source` until it ends, and tell `sinks` what happens.

    Args:
      session: serves the turns; used from the calling thread only.
      source: not opened yet; closed in the end.
      questions: asked when their second comes.
      sinks: closed in the end.
      fps: turns a second, at most 1.
      pace: `realtime` plays a recorded source against the clock and leaves out turns that come too late; `fast`
        serves every turn. A live source is always in real time.
      stop: ends the run after the turn in progress when it returns True or is set; so does Ctrl-C.
      max_turns: ends the run after this many.
      on_turn, on_warning: called after each turn, and with a line for people when something goes on without a part.
      every_turn: a `turn.state` event for every turn instead of every change.

    Raises:
      UsageError: `fps` or `pace` make no sense.
      QuestionError: a question is empty, or one of the first turn is refused; a later one is only an `error` event.
      SourceError: the source does not open, or broke off; what happened before is written.
      OutputError: a sink failed before the first turn, or none is left.
      EdgeError: whatever the session raised.
    """
    if pace not in ("realtime", "fast"):
        raise UsageError(f"The pace should be `realtime` or `fast`, found `{pace}`", hint="Use `--pace realtime`")
    for question in questions:
        if not question.text.strip():
            raise QuestionError(f"The question at {question.at_s:g} s is empty", hint='Use `--ask "What happens?"`')
    clock = clock or SystemClock()
    realtime = source.live or pace == "realtime"
    summary = RunSummary()

    def warn(message: str) -> None:
        summary.warnings.append(message)
        if on_warning is not None:
            on_warning(message)

    factory = EventFactory(f"s-{uuid.uuid4().hex[:8]}", stream_name, clock)
    viewers = [_BackgroundSink(sink, lossy=realtime) for sink in sinks if hasattr(sink, "handle_frame")]
    outputs = Outputs([*(s for s in sinks if not hasattr(s, "handle_frame")), *viewers], factory, warn)
    run = _Run(session, source, outputs, TurnSchedule(fps), clock, summary)
    run.gallery = _Gallery(viewers)
    run.questions = deque(sorted(questions, key=lambda question: question.at_s))
    run.realtime = realtime
    run.stop = stop.is_set if isinstance(stop, threading.Event) else stop or (lambda: False)
    run.max_turns, run.on_turn, run.on_warning = max_turns, on_turn, warn
    run.narrator = Narrator(outputs.emit, clock, late_after_s=2 * run.schedule.interval_s, every_turn=every_turn)
    return run.run()


class _Run:
    """One call of `run_stream`."""

    questions: deque[Question]
    realtime: bool
    stop: Callable[[], bool]
    max_turns: int | None
    on_turn: Callable[[Turn], None] | None
    on_warning: Callable[[str], None]
    narrator: Narrator
    gallery: _Gallery

    def __init__(
        self,
        session: Session,
        source: Source,
        outputs: Outputs,
        schedule: TurnSchedule,
        clock: Clock,
        summary: RunSummary,
    ) -> None:
        self.session, self.source, self.outputs = session, source, outputs
        self.schedule, self.clock, self.summary = schedule, clock, summary
        self.pacer = FramePacer(schedule)
        self.feed: _Feed | None = None
        self.reported_turns = self.reported_frames = 0
        self.reported_ns = 0
        self.announced = False

    def run(self) -> RunSummary:
        start_ns = self.clock.monotonic_ns()
        try:
            self.outputs.open()
            self._announce()
            self._open_source()
            self.summary.end_reason = self._play_realtime() if self.realtime else self._play_fast()
            if self.summary.end_reason == "ended":
                self._tell_ending(getattr(self.source, "ending", None))
        except KeyboardInterrupt:
            self.summary.end_reason = "interrupted"
        except EdgeError as error:
            self._tell_error(error)
            raise
        finally:
            self.summary.wall_s = (self.clock.monotonic_ns() - start_ns) / 1e9
            self._finish()
        return self.summary

    def _announce(self) -> None:
        self.outputs.emit(
            SESSION_CREATED,
            source=self.source.name,
            live=self.source.live,
            pace="realtime" if self.realtime else "fast",
            turn_interval_s=self.schedule.interval_s,
            questions=len(self.questions),
        )
        self.announced = True

    def _open_source(self) -> None:
        info = self.source.open()
        known = {"fps": info.fps, "duration_s": info.duration_s}
        facts = {name: round(value, 3) for name, value in known.items() if value is not None}
        size = {"width": info.width, "height": info.height}
        self.outputs.emit(SOURCE_STATE, state="live", source=self.source.name, **size, **facts)

    # Playing

    def _play_fast(self) -> str:
        while True:
            frame = self.source.read()
            known_s = horizon_before(frame) if frame is not None else self.pacer.newest_media_time_s
            while known_s is not None and (due := self.pacer.oldest_due(known_s)):
                reason = self._serve(due)
                if reason:
                    return reason
            if frame is None:
                return "ended"
            if self.stop():
                return "stopped"
            self.pacer.offer(frame)
            self.gallery.show(frame)

    def _play_realtime(self) -> str:
        self.feed = feed = _Feed(self.source, self.pacer, self.clock, self.gallery)
        feed.start()
        while True:
            if self.stop():
                return "stopped"
            due, finished = feed.newest_due()
            if due is not None:
                self.summary.dropped_turns += due.skipped_turns
                reason = self._serve(due)
                if reason:
                    return reason
            elif finished:
                if feed.failure is not None:
                    raise feed.failure
                return "ended"
            else:
                self.clock.sleep_until_ns(feed.nap_until_ns())
            self._report_drops()

    def _serve(self, due: DueTurn) -> str:
        """Serve one turn; returns why the run ends after it, or ""."""
        self._ask(due.t)
        self.narrator.begin(due, self.feed.time_ns_of(due.frame) if self.feed else None)
        turn = self.session.push(due.frame.pixels, due.t, self.narrator.text)
        self.outputs.forgiving = True
        times_ms = self.narrator.finish(turn)
        self.summary.turns += 1
        self.summary.responses += "first_text" in times_ms
        self.summary.stream_s = float(due.t + 1)
        self.summary.times.add(times_ms)
        if self.on_turn is not None:
            self.on_turn(turn)
        if self.max_turns is not None and self.summary.turns >= self.max_turns:
            return "max_turns"
        return "stopped" if self.stop() else ""

    def _ask(self, t: int) -> None:
        while self.questions and self.questions[0].at_s <= t:
            question = self.questions.popleft()
            try:
                self.session.ask(question.text)
            except QuestionError as error:
                if not self.summary.turns:
                    raise
                self.on_warning(error.message)
                self.outputs.emit(ERROR, **error_fields(error))
            else:
                self.narrator.question(t, question.text, question.at_s)

    # Telling

    def _report_drops(self, *, last: bool = False) -> None:
        self.summary.dropped_frames = int(getattr(self.source, "dropped_frames", 0))
        turns = self.summary.dropped_turns - self.reported_turns
        frames = self.summary.dropped_frames - self.reported_frames
        now_ns = self.clock.monotonic_ns()
        if not (turns or frames) or (now_ns - self.reported_ns < _DROP_REPORT_NS and self.reported_ns and not last):
            return
        self.reported_ns = now_ns
        self.reported_turns, self.reported_frames = self.summary.dropped_turns, self.summary.dropped_frames
        totals = {"turns_total": self.reported_turns, "frames_total": self.reported_frames}
        self.outputs.emit(FRAMES_DROPPED, reason="late", turns=turns, frames=frames, **totals)

    def _tell_ending(self, ending: Ending | None) -> None:
        fields: dict[str, Any] = {"reason": "the source is over"}
        if ending is not None:
            fields["frames_read"] = ending.frames_read
            if ending.frames_announced is not None:
                fields["frames_announced"] = ending.frames_announced
            if ending.early:
                both = f"{ending.frames_read} of {ending.frames_announced} frames"
                fields["reason"] = f"ended early: {both} could be read"
                self.on_warning(f"Source `{self.source.name}` {fields['reason']}")
        self.outputs.emit(SOURCE_STATE, state="ended", source=self.source.name, **fields)

    def _tell_error(self, error: EdgeError) -> None:
        if not self.announced:
            return
        fields = error_fields(error)
        try:
            if error.exit_code == 4:
                self.outputs.emit(SOURCE_STATE, state="lost", source=self.source.name, reason=fields["message"])
            self.outputs.emit(ERROR, **fields)
        except OutputError:
            return  # the outputs are what failed

    def _finish(self) -> None:
        """Let go of everything, whatever happened; the last events are written before the sinks close."""
        if self.source.live:
            self.source.close()  # wakes a feed that waits for a frame
        if self.feed is None or self.feed.finish():
            self.source.close()
        self.summary.questions_left = len(self.questions)
        if not self.announced:
            self.outputs.close()
            return
        try:
            self._report_drops(last=True)
            counts = ("turns", "responses", "dropped_turns", "dropped_frames", "questions_left")
            self.outputs.emit(
                SESSION_ENDED,
                reason=self.summary.end_reason,
                stream_s=self.summary.stream_s,
                wall_s=round(self.summary.wall_s, 3),
                **{name: getattr(self.summary, name) for name in counts},
            )
        except OutputError as error:  # what made the run fail was told before, so this is news
            self.on_warning(error.message)
        finally:
            self.outputs.close()


class _Feed:
    """The thread that plays the source against the clock and keeps the pacer supplied."""

    def __init__(self, source: Source, pacer: FramePacer, clock: Clock, gallery: _Gallery) -> None:
        self.failure: BaseException | None = None
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
        while now_ns < due_ns and not self._stop.is_set():
            self._clock.sleep_until_ns(min(due_ns, now_ns + _NAP_NS))
            now_ns = self._clock.monotonic_ns()
        return not self._stop.is_set()


class _Gallery:
    """Passes pictures on to the sinks that show them, at most `SHOWN_FPS` a second of the stream."""

    def __init__(self, viewers: Sequence[_BackgroundSink]) -> None:
        self._viewers = viewers
        self._next_s = 0.0

    def show(self, frame: Frame) -> None:
        if self._viewers and frame.media_time_s + 1e-6 >= self._next_s:
            # From one grid point to the next, so that 29.97 fps gives ten pictures a second and not 9.99.
            self._next_s = (math.floor(frame.media_time_s * SHOWN_FPS + 1e-6) + 1) / SHOWN_FPS
            for viewer in self._viewers:
                viewer.show(frame)


class _BackgroundSink:
    """A sink on a thread of its own, behind a short queue: its work never holds up a turn.

    When it cannot keep up in real time (`lossy`), pictures are left out; otherwise the caller waits.
    """

    def __init__(self, sink: Any, *, lossy: bool) -> None:
        self.name = sink.name
        self._sink = sink
        self._lossy = lossy
        self._changed = threading.Condition()
        self._queue: deque[tuple[Event | None, Frame | None]] = deque()
        self._pictures = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)

    def open(self) -> None:
        self._sink.open()
        self._thread.start()

    def handle(self, event: Event, frame: Frame | None) -> None:
        self._raise_failure()
        with self._changed:
            if len(self._queue) < _QUEUED_EVENTS:
                self._queue.append((event, frame))
                self._changed.notify_all()

    def show(self, frame: Frame) -> None:
        """Queue a picture; what goes wrong is raised by the next `handle`."""
        with self._changed:
            if not self._lossy:
                room = lambda: self._pictures < _QUEUED_PICTURES or not self._thread.is_alive()  # noqa: E731
                self._changed.wait_for(room, _FINISH_S)
            if self._pictures < _QUEUED_PICTURES:
                self._queue.append((None, frame))
                self._pictures += 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let the thread work off its queue and finish the output."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_FINISH_S)
            if self._thread.is_alive():
                raise OutputError(f"Output `{self.name}` was not finished within {_FINISH_S:.0f} s")
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            try:
                while (item := self._next()) is not None:
                    event, frame = item
                    if event is not None:
                        self._sink.handle(event, frame)
                    elif frame is not None:
                        self._sink.handle_frame(frame)
            finally:
                self._sink.close()
        except BaseException as error:  # noqa: BLE001 - raised again where the run hands over the next event
            self._failure = error
        finally:
            with self._changed:
                self._pictures = 0
                self._changed.notify_all()

    def _next(self) -> tuple[Event | None, Frame | None] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            item = self._queue.popleft()
            if item[0] is None:
                self._pictures -= 1
                self._changed.notify_all()
            return item

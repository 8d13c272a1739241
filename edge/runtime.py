"""A stream from its source through the session to its outputs.

The only place that wires the parts. The session stays on the caller's thread; `edge.feed` plays the source on one of
its own, and `edge.viewers` gives one to each output whose work is heavy.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edge.clock import Clock, SystemClock
from edge.errors import EdgeError, OutputError, QuestionError, UsageError
from edge.events import ERROR, FRAMES_DROPPED, SESSION_CREATED, SESSION_ENDED, SOURCE_STATE, EventFactory
from edge.feed import Feed
from edge.narration import Narrator
from edge.outputs import Outputs, error_fields
from edge.pacing import DueTurn, FramePacer, TurnSchedule, horizon_before
from edge.sinks.base import Sink
from edge.sources.base import Ending, Source
from edge.summary import RunSummary
from edge.turn import Turn
from edge.viewers import BackgroundSink, Gallery

_DROP_REPORT_NS = 1_000_000_000
_WARN_BEHIND_S = 5.0


class Session(Protocol):
    """What the runtime needs of a `StreamSession`."""

    def ask(self, text: str) -> int: ...

    def close_question(self, question: int | str) -> str: ...

    def push(self, pixels: np.ndarray, t: int, on_text: Callable[[str], None] | None = None) -> Turn: ...


@dataclass(frozen=True)
class Question:
    """A question and the stream second from which it holds; it joins the first turn that is not before it.

    Raises:
      QuestionError: the text is empty.
    """

    at_s: float
    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise QuestionError(f"The question at {self.at_s:g} s is empty", hint='Use `--ask "What happens?"`')


@dataclass(frozen=True)
class Closing:
    """A question, by its text, and the stream second from which it needs no more answers."""

    at_s: float
    text: str


def run_stream(
    session: Session,
    source: Source,
    *,
    questions: Sequence[Question] = (),
    closings: Sequence[Closing] = (),
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
      closings: questions closed when their second comes.
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
      QuestionError: the session refuses one of the questions, each looked at by itself, before the source opens; or
        those of the first turn together. Later ones that are too much together are only an `error` event.
      SourceError: the source does not open, or broke off; what happened before is written.
      OutputError: a sink failed before the first turn, or none is left.
      EdgeError: whatever the session raised.
    """
    try:
        schedule = _checked(session, questions, fps, pace)
    except EdgeError:
        for sink in sinks:
            sink.close()
        raise
    clock = clock or SystemClock()
    realtime = source.live or pace == "realtime"
    summary = RunSummary(turn_interval_s=schedule.interval_s, realtime=realtime)

    def warn(message: str) -> None:
        summary.warnings.append(message)
        if on_warning is not None:
            on_warning(message)

    viewers = [BackgroundSink(sink, lossy=realtime, on_warning=warn) for sink in sinks if hasattr(sink, "handle_frame")]
    factory = EventFactory(f"s-{uuid.uuid4().hex[:8]}", stream_name, clock)
    outputs = Outputs([*(s for s in sinks if not hasattr(s, "handle_frame")), *viewers], factory, warn)
    run = _Run(
        session,
        source,
        outputs,
        schedule,
        clock,
        summary,
        narrator=Narrator(outputs.emit, clock, late_after_s=2 * schedule.interval_s, every_turn=every_turn),
        gallery=Gallery(viewers),
        questions=deque(sorted(questions, key=lambda question: question.at_s)),
        closings=deque(sorted(closings, key=lambda closing: closing.at_s)),
        realtime=realtime,
        stop=stop.is_set if isinstance(stop, threading.Event) else stop or (lambda: False),
        max_turns=max_turns,
        on_turn=on_turn,
        on_warning=warn,
    )
    return run.run()


def _checked(session: Session, questions: Sequence[Question], fps: float, pace: str) -> TurnSchedule:
    """The schedule of a run, once everything that can be refused before it starts has been looked at."""
    if pace not in ("realtime", "fast"):
        raise UsageError(f"The pace should be `realtime` or `fast`, found `{pace}`", hint="Use `--pace realtime`")
    schedule = TurnSchedule(fps)
    check_question = getattr(session, "check_question", None)
    for question in questions:
        try:
            if check_question is not None:
                check_question(question.text)
        except QuestionError as error:
            raise QuestionError(f"The question at {question.at_s:g} s: {error.message}", hint=error.hint) from None
    return schedule


@dataclass
class _Run:
    """One call of `run_stream`."""

    session: Session
    source: Source
    outputs: Outputs
    schedule: TurnSchedule
    clock: Clock
    summary: RunSummary
    narrator: Narrator
    gallery: Gallery
    questions: deque[Question]
    closings: deque[Closing]
    realtime: bool
    stop: Callable[[], bool]
    max_turns: int | None
    on_turn: Callable[[Turn], None] | None
    on_warning: Callable[[str], None]
    feed: Feed | None = None
    announced: bool = False
    reported_turns: int = 0
    reported_frames: int = 0
    reported_ns: int = 0
    told_behind: bool = False
    pacer: FramePacer = field(init=False)

    def __post_init__(self) -> None:
        self.pacer = FramePacer(self.schedule)

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
        self.feed = feed = Feed(self.source, self.pacer, self.clock, self.gallery)
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
            self._tell_behind(feed.behind_s)

    def _serve(self, due: DueTurn) -> str:
        """Serve one turn; returns why the run ends after it, or ""."""
        self._mind_questions(due.t)
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

    def _mind_questions(self, t: int) -> None:
        """Ask and close what is due, in the order of its seconds."""
        while True:
            due = [queue[0].at_s for queue in (self.questions, self.closings) if queue and queue[0].at_s <= t]
            if not due:
                return
            if self.questions and self.questions[0].at_s == min(due):
                self._ask(t, self.questions.popleft())
            else:
                self._close(t, self.closings.popleft())

    def _ask(self, t: int, question: Question) -> None:
        try:
            self.session.ask(question.text)
        except QuestionError as error:
            if not self.summary.turns:
                raise
            self.on_warning(error.message)
            self.outputs.emit(ERROR, **error_fields(error))
        else:
            self.narrator.question(t, question.text, question.at_s)

    def _close(self, t: int, closing: Closing) -> None:
        try:
            self.session.close_question(closing.text)
        except QuestionError as error:  # it was refused, or forgotten to make room for later ones
            self.on_warning(error.message)
        else:
            self.narrator.closed(t, closing.text, closing.at_s)

    # Telling

    def _tell_behind(self, behind_s: float) -> None:
        if behind_s > _WARN_BEHIND_S and not self.told_behind:
            self.told_behind = True
            self.on_warning(
                f"Source `{self.source.name}` cannot be read as fast as it plays: {behind_s:.1f} s behind, and turns "
                "come late; `--pace fast` takes the time it needs"
            )

    def _report_drops(self, *, last: bool = False) -> None:
        skipped = self.feed.skipped_frames if self.feed else 0
        self.summary.dropped_frames = int(getattr(self.source, "dropped_frames", 0)) + skipped
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

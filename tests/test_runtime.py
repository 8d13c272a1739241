"""A whole stream with a scripted session: which events come, in which order, and what survives which trouble."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import threading
import time

import pytest
from mjpeg_server import jpeg, mjpeg_server, wait
from streams import FastClock, ListSource, RecordingSink, ScriptedSession, frames_at, picture, write_video

from edge.clock import SystemClock
from edge.errors import BackendError, FrameError, OutputError, QuestionError, SourceError, UsageError
from edge.frames import Frame
from edge.runtime import Closing, Question, run_stream
from edge.sinks import open_sinks
from edge.sources import SourceUrl
from edge.sources.camera import url_camera
from edge.sources.file import VideoFileSource
from edge.summary import StageTimes

DELTA = "response.delta"


def play(session, source, **options):
    sink = RecordingSink()
    options = {"pace": "fast", "clock": SystemClock(), **options}
    summary = run_stream(session, source, sinks=[sink, *options.pop("sinks", [])], **options)
    return summary, sink


def test_a_fast_run_serves_every_second_with_its_own_frame():
    session = ScriptedSession()
    summary, sink = play(session, ListSource(frames_at(10, 20)))
    assert session.served == [(t, 10 * t) for t in range(20)]
    assert (summary.turns, summary.dropped_turns, summary.end_reason, summary.stream_s) == (20, 0, "ended", 20.0)
    assert sink.closed == 1 and session.thread_names == {"MainThread"}


def test_events_tell_the_story_in_order():
    session = ScriptedSession({2: "A ball."})
    source = ListSource(frames_at(5, 4), name="table")
    summary, sink = play(session, source, questions=[Question(0.5, "What happens?")], stream_name="cam0")
    assert sink.types() == [
        "session.created",
        "source.state",
        "turn.state",
        "question.asked",
        "response.created",
        DELTA,
        DELTA,
        "response.completed",
        "turn.state",
        "turn.state",
        "source.state",
        "session.ended",
    ]
    assert [event.seq for event in sink.events] == list(range(1, len(sink.events) + 1))
    assert {(event.session, event.stream) for event in sink.events} == {(sink.events[0].session, "cam0")}
    for event in sink.events:
        json.loads(event.to_line())
    completed = sink.of("response.completed")[0]
    assert completed["text"] == "A ball." and completed["final"] is True and completed["late"] is False
    assert completed["media_time"] == {"start_s": 2.0, "end_s": 3.0} and completed["turn"] == 3
    assert completed["tokens"]["visual"] == 16 and completed["kv"] == {"used": 60, "evicted_turns": 0}
    assert "".join(delta["text"] for delta in sink.of(DELTA)).strip() == "A ball."
    assert [state["state"] for state in sink.of("turn.state")] == ["silence", "response", "silence"]
    assert sink.of("question.asked")[0]["media_time"]["start_s"] == 1.0
    assert sink.of("source.state")[-1]["state"] == "ended"
    assert sink.of("session.ended")[0]["reason"] == "ended" and sink.of("session.ended")[0]["turns"] == 4
    assert summary.responses == 1 and summary.times.percentile_ms("turn", 50) == 1.0


def test_every_turn_can_be_told():
    _, sink = play(ScriptedSession(), ListSource(frames_at(2, 6)), every_turn=True)
    assert len(sink.of("turn.state")) == 6


def test_a_slower_turn_rate_keeps_whole_second_labels():
    session = ScriptedSession()
    play(session, ListSource(frames_at(4, 9)), fps=0.5)
    assert [t for t, _ in session.served] == [0, 2, 4, 6, 8]


def test_a_video_file_at_29_97_fps_gets_a_turn_a_second(tmp_path):
    path = write_video(tmp_path / "a.avi", (picture(i % 200) for i in range(300)), 30000 / 1001, "MJPG")
    session = ScriptedSession()
    summary, _ = play(session, VideoFileSource(path))
    assert [t for t, _ in session.served] == list(range(10))  # the last frame is at 9.977 s
    newest = [max(i for i in range(300) if i * 1001 / 30000 <= t + 1e-3) for t in range(10)]
    assert all(abs(red - number % 200) <= 6 for (_, red), number in zip(session.served, newest, strict=True))
    assert summary.end_reason == "ended"


def test_a_video_that_ends_early_is_told_with_both_numbers(tmp_path):
    path = write_video(tmp_path / "a.avi", [picture(3 * i) for i in range(60)], 25.0, "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    warnings = []
    summary, sink = play(ScriptedSession(), VideoFileSource(path), on_warning=warnings.append)
    ended = sink.of("source.state")[-1]
    assert ended["state"] == "ended" and 0 < ended["frames_read"] < 60 == ended["frames_announced"]
    assert "ended early" in ended["reason"] and "ended early" in warnings[0] and summary.warnings == warnings


# Real time


def test_in_real_time_a_fast_session_serves_what_a_fast_run_serves():
    session = ScriptedSession()
    summary, sink = play(session, ListSource(frames_at(10, 12)), pace="realtime", clock=FastClock(4))
    assert session.served == [(t, 10 * t) for t in range(12)]
    assert summary.dropped_turns == 0 and summary.wall_s >= 11
    assert not sink.of("frames.dropped") and session.thread_names == {"MainThread"}


def test_late_turns_are_left_out_newest_first_and_counted():
    clock = FastClock(20)
    session = ScriptedSession({t: "Hello." for t in range(60)}, turn_s=2.5, sleep=lambda s: time.sleep(s / 20))
    summary, sink = play(session, ListSource(frames_at(10, 40)), pace="realtime", clock=clock)
    seconds = [t for t, _ in session.served]
    assert all(red == 10 * t % 256 for t, red in session.served), "a turn got another second's frame"
    assert 2 <= summary.turns <= 17 and all(b - a >= 2 for a, b in itertools.pairwise(seconds))
    assert summary.dropped_turns == seconds[-1] + 1 - len(seconds)
    dropped = sink.of("frames.dropped")
    assert sum(event["turns"] for event in dropped) == summary.dropped_turns == dropped[-1]["turns_total"]
    reported_ns = [event.wall_ns for event in sink.events if event.type == "frames.dropped"]
    assert all(b - a >= 1e9 for a, b in itertools.pairwise(reported_ns)), "more than one a second"
    assert any(event["late"] for event in sink.of("response.completed"))
    assert sink.of("response.completed")[2]["timing_ms"]["frame_to_event"] >= 2500


class SlowRecording(ListSource):
    """Twice as slow as the clock; what is skipped costs nothing."""

    def read(self):
        time.sleep(0.02)  # at speed 20 that is 0.4 s, for 0.2 s of stream
        return super().read()

    def skip_to(self, media_time_s):
        wanted = [frame for frame in self._items if frame.media_time_s >= media_time_s - 1e-6]
        skipped = round(wanted[0].media_time_s * 5) - self._count if wanted else 0
        self._items, self._count = iter(wanted), self._count + skipped
        return skipped


def test_a_recording_that_is_read_too_slowly_leaves_pictures_out_and_stays_current():
    session = ScriptedSession()
    frames = frames_at(5, 40)
    summary, sink = play(session, SlowRecording(frames), pace="realtime", clock=FastClock(20), every_turn=True)
    assert all(red == 5 * t for t, red in session.served), "a turn got another second's frame"
    assert summary.dropped_frames > 20 and summary.turns + summary.dropped_turns == 40
    assert summary.dropped_frames == sink.of("frames.dropped")[-1]["frames_total"]
    ages_ms = [turn["timing_ms"]["frame_age"] for turn in sink.of("turn.state")]
    assert sorted(ages_ms)[len(ages_ms) // 2] < 6000, "left alone, the median would be 20 s late"


def test_a_recording_that_cannot_keep_up_is_told_once():
    def slow():
        for frame in frames_at(1, 10):
            time.sleep(0.1)  # at speed 20 a second of stream takes two
            yield frame

    warnings = []
    play(ScriptedSession(), ListSource(slow()), pace="realtime", clock=FastClock(20), on_warning=warnings.append)
    assert len(warnings) == 1 and "cannot be read as fast as it plays" in warnings[0]


def test_a_source_slower_than_the_clock_delays_turns_and_mislabels_none():
    def slow():
        for frame in frames_at(5, 6):
            time.sleep(0.04)  # at speed 20 a frame costs 0.8 s, four times its share
            yield frame

    session = ScriptedSession()
    play(session, ListSource(slow()), pace="realtime", clock=FastClock(20))
    assert session.served == [(t, 5 * t) for t in range(6)]


def test_a_camera_is_always_in_real_time_and_its_loss_ends_the_run_with_everything_written(tmp_path):
    def parts():
        for value in range(30):
            yield jpeg(100 + value)
            yield wait(0.1)

    outputs = open_sinks([str(tmp_path / name) for name in ("e.jsonl", "t.vtt", "o.mp4")])
    with mjpeg_server(parts) as url:
        source = url_camera(SourceUrl(url), clock=SystemClock(), read_timeout_s=1.0)
        session = ScriptedSession({1: "Grey."})
        sink = RecordingSink()
        with pytest.raises(SourceError, match="closed the stream after 30 frames") as caught:
            run_stream(session, source, sinks=[sink, *outputs], pace="fast")
    assert caught.value.exit_code == 4
    assert [t for t, _ in session.served][:3] == [0, 1, 2]
    assert sink.types()[-3:] == ["source.state", "error", "session.ended"]
    assert sink.of("source.state")[-1]["state"] == "lost" and sink.of("session.ended")[0]["reason"] == "error"
    lines = (tmp_path / "e.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines] == sink.types()
    assert not any("s3cret" in line for line in lines)
    assert "Grey." in (tmp_path / "t.vtt").read_text() and (tmp_path / "o.mp4").stat().st_size > 5000
    assert not [thread for thread in threading.enumerate() if thread.name in ("camera", "feed", "sink")]


# Stopping


@pytest.mark.parametrize("pace", ["fast", "realtime"])
def test_a_stop_ends_the_run_after_the_turn_in_progress(pace):
    stop = threading.Event()
    session = ScriptedSession(before_turn=lambda t: stop.set() if t == 3 else None)
    summary, sink = play(session, ListSource(frames_at(5, 60)), pace=pace, clock=FastClock(10), stop=stop)
    assert (summary.turns, summary.end_reason) == (4, "stopped")
    assert sink.types()[-1] == "session.ended" and sink.of("session.ended")[0]["reason"] == "stopped"


def test_control_c_ends_the_run_with_the_last_event_written():
    session = ScriptedSession()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    source = ListSource(frames_at(5, 60))
    summary, sink = play(session, source, pace="realtime")
    assert summary.end_reason == "interrupted" and summary.wall_s < 10 and source.closed
    assert sink.types()[-1] == "session.ended" and sink.closed == 1


def test_a_run_can_be_limited_to_some_turns():
    seen = []
    summary, _ = play(
        ScriptedSession(), ListSource(frames_at(5, 60)), max_turns=7, on_turn=lambda turn: seen.append(turn.t)
    )
    assert (summary.turns, summary.end_reason, seen) == (7, "max_turns", list(range(7)))


# Trouble


def test_a_source_that_does_not_open_is_an_event_and_an_error(tmp_path):
    sink = RecordingSink()
    with pytest.raises(SourceError, match="does not open"):
        (tmp_path / "a.mp4").write_bytes(b"x")
        run_stream(ScriptedSession(), VideoFileSource(tmp_path / "a.mp4"), sinks=[sink])
    assert sink.types() == ["session.created", "source.state", "error", "session.ended"]
    assert sink.of("error")[0]["code"] == "SourceError" and sink.of("error")[0]["hint"]


@pytest.mark.parametrize("pace", ["fast", "realtime"])
@pytest.mark.parametrize("error", [BackendError("the backend failed"), FrameError("too narrow"), ZeroDivisionError()])
def test_a_failing_turn_loses_nothing_that_was_written(tmp_path, pace, error):
    files = open_sinks([str(tmp_path / name) for name in ("e.jsonl", "t.vtt", "t.srt", "o.mp4")])
    session = ScriptedSession({1: "One."}, fails_at={3: error})
    source = ListSource(frames_at(5, 9))
    with pytest.raises(type(error)):
        play(session, source, sinks=files, pace=pace, clock=FastClock(10))
    events = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert events[-1]["type"] == "session.ended" and events[-1]["reason"] == "error" and events[-1]["turns"] == 3
    assert "One." in (tmp_path / "t.vtt").read_text() and "One." in (tmp_path / "t.srt").read_text()
    assert VideoFileSource(tmp_path / "o.mp4").open().width == 640
    assert source.closed


def test_an_error_inside_the_source_reaches_the_caller_whatever_it_is():
    for error in (SourceError("gone"), RuntimeError("a bug")):
        for pace in ("fast", "realtime"):
            with pytest.raises(type(error)):
                play(ScriptedSession(), ListSource([*frames_at(5, 2), error]), pace=pace, clock=FastClock(10))


class FailingSink(RecordingSink):
    """A disk that is full from its `limit`-th event on."""

    name = "full.jsonl"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def handle(self, event):
        if len(self.events) >= self.limit:
            raise OutputError("Output `full.jsonl` cannot be written: No space left on device")
        super().handle(event)


class FailingViewer(FailingSink):
    """The same for a sink on a thread of its own."""

    def handle_frame(self, frame):
        pass


@pytest.mark.parametrize("kind", [FailingSink, FailingViewer])
def test_a_sink_that_fails_midway_is_left_out_and_the_stream_goes_on(kind):
    failing = kind(5)
    session = ScriptedSession({t: "Hi." for t in range(0, 20, 2)}, turn_s=0.005)
    summary, sink = play(session, ListSource(frames_at(5, 20)), sinks=[failing])
    assert summary.turns == 20 and summary.end_reason == "ended"
    assert [error["code"] for error in sink.of("error")] == ["OutputError"]
    assert summary.warnings == ["Output `full.jsonl` cannot be written: No space left on device"]
    assert len(failing.events) == 5 and failing.closed >= 1


def test_a_sink_that_fails_at_the_very_end_is_warned_of():
    warnings = []
    failing = FailingSink(4)  # created, live, one state, ended; the last event does not fit
    session = ScriptedSession()
    run_stream(session, ListSource(frames_at(5, 4)), sinks=[failing], pace="fast", on_warning=warnings.append)
    assert len(session.served) == 4 and "No space left" in warnings[0]


def test_a_sink_that_fails_before_the_first_turn_or_as_the_last_one_is_an_error():
    with pytest.raises(OutputError, match="full"):
        play(ScriptedSession(), ListSource(frames_at(5, 4)), sinks=[FailingSink(1)])
    session = ScriptedSession()
    with pytest.raises(OutputError, match="full"):
        run_stream(session, ListSource(frames_at(5, 20)), sinks=[FailingSink(3)], pace="fast", every_turn=True)
    assert len(session.served) < 5


def test_an_output_on_a_full_disk_is_an_error_before_the_first_turn(tmp_path):
    (tmp_path / "e.jsonl").symlink_to("/dev/full")
    session = ScriptedSession()
    with pytest.raises(OutputError, match=r"e\.jsonl` cannot be written"):
        run_stream(session, ListSource(frames_at(5, 4)), sinks=open_sinks([str(tmp_path / "e.jsonl")]))
    assert session.served == []


def test_questions_that_cannot_be_asked():
    with pytest.raises(QuestionError, match="at 3 s is empty"):
        play(ScriptedSession(), ListSource(frames_at(5, 4)), questions=[Question(3, "  ")])
    with pytest.raises(QuestionError, match="500 characters"):
        play(ScriptedSession(), ListSource(frames_at(5, 4)), questions=[Question(0, "x" * 500)])
    session = ScriptedSession()
    questions = [Question(2, "x" * 500), Question(2, "And now?"), Question(99, "Never?")]
    summary, sink = play(session, ListSource(frames_at(5, 4)), questions=questions)
    assert session.asked == ["And now?"] and summary.turns == 4 and summary.questions_left == 1
    assert [error["code"] for error in sink.of("error")] == ["QuestionError"]


def test_questions_are_asked_and_closed_in_the_order_of_their_seconds():
    session = ScriptedSession()
    questions = [Question(0, "Why?"), Question(2.2, "And now?"), Question(3.9, "Again?")]
    closings = [Closing(2.8, "And now?"), Closing(3, "Why?"), Closing(4, "Why?")]
    summary, sink = play(session, ListSource(frames_at(5, 6)), questions=questions, closings=closings)
    assert session.asked == ["Why?", "And now?", "Again?"] and session.closed == ["And now?", "Why?"]
    told = [(event.type.partition(".")[2], event.fields["text"], event.fields["media_time"]["start_s"])
            for event in sink.events if event.type.startswith("question.")]  # fmt: skip
    assert told == [
        ("asked", "Why?", 0),
        ("asked", "And now?", 3),
        ("closed", "And now?", 3),
        ("closed", "Why?", 3),
        ("asked", "Again?", 4),
    ]
    assert summary.warnings == ["No question `Why?` is open"]


def test_a_question_that_the_session_refuses_is_an_error_before_the_source_opens(tmp_path):
    class Careful(ScriptedSession):
        def check_question(self, text):
            if len(text) > 300:
                raise QuestionError("too long")

    session, source = Careful(), ListSource(frames_at(5, 4))
    files = open_sinks([str(tmp_path / name) for name in ("e.jsonl", "t.vtt", "o.mp4")])
    with pytest.raises(QuestionError, match="at 2 s: too long"):
        questions = [Question(0, "Why?"), Question(2, "x" * 500)]
        run_stream(session, source, questions=questions, sinks=files, pace="fast")
    assert session.served == [] and source.read().media_time_s == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"pace": "slow"}, {"fps": 2.0}, {"fps": 0}])
def test_a_pace_or_rate_that_makes_no_sense_is_a_usage_error(options):
    with pytest.raises(UsageError):
        play(ScriptedSession(), ListSource([]), **options)


# Resources


class SlowViewer(RecordingSink):
    """Takes 50 ms for a picture."""

    name = "slow"
    pictures = 0

    def handle_frame(self, frame):
        self.pictures += 1
        time.sleep(0.05)


def test_a_slow_viewer_never_holds_up_a_turn():
    slow = SlowViewer()
    start = time.monotonic()
    frames = frames_at(25, 40)
    summary, sink = play(ScriptedSession(), ListSource(frames), pace="realtime", clock=FastClock(20), sinks=[slow])
    assert summary.turns + summary.dropped_turns == 40 and summary.turns >= 20  # held up, it would be 4
    assert 10 < slow.pictures < 250 and time.monotonic() - start < 15
    assert summary.warnings == ["Output `slow` cannot keep up; pictures are left out of it"]
    assert [event.seq for event in slow.events] == [event.seq for event in sink.events], "an event was lost"


def test_events_that_a_viewer_cannot_take_are_told_once(monkeypatch):
    monkeypatch.setattr("edge.viewers._QUEUED_EVENTS", 3)
    busy = SlowViewer()
    summary, _ = play(ScriptedSession(), ListSource(frames_at(10, 6)), sinks=[busy], every_turn=True)
    assert summary.warnings == ["Output `slow` cannot keep up; events are left out of it"]
    assert len(busy.events) < 15


def test_a_fast_run_shows_a_viewer_ten_pictures_a_second():
    slow = SlowViewer()
    play(ScriptedSession(), ListSource(frames_at(25, 3)), sinks=[slow])
    assert slow.pictures == 30
    assert slow.closed == 1


def test_stage_times_keep_the_newest_and_give_percentiles():
    times = StageTimes(max_samples=100)
    for number in range(250):
        times.add({"turn": float(number)})
    assert times.samples_ms("turn")[0] == 150.0 and len(times.samples_ms("turn")) == 100
    assert (times.percentile_ms("turn", 50), times.percentile_ms("turn", 95), times.percentile_ms("turn", 100)) == (
        199,
        244,
        249,
    )


def test_a_long_stream_does_not_grow():
    """A day of turns in fixed memory: what the runtime keeps after 40,000 s is what it kept after 4,000 s."""
    counted = []

    def count_objects(t):
        if t in (4_000, 40_000):
            gc.collect()
            counted.append(len(gc.get_objects()))

    shared = picture(1, 1, 1)
    session = ScriptedSession({t: "Hi." for t in range(0, 40_001, 50)}, before_turn=count_objects)
    session.served = _Forgetful()
    frames = (Frame(shared, float(t)) for t in range(40_002))
    run_stream(session, ListSource(frames), pace="fast")
    assert counted[1] - counted[0] < 500


class _Forgetful(list):
    def append(self, item):
        pass

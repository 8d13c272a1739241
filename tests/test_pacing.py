"""Which frame serves which turn, against a brute-force reading of the rule."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import picture

from edge.errors import UsageError
from edge.frames import Frame
from edge.pacing import FRAME_TOLERANCE_S, DueTurn, FramePacer, TurnSchedule, horizon_before

ONE_PIXEL = picture(0, 1, 1)
gaps = st.lists(st.floats(0.002, 4.0), min_size=0, max_size=60)
rates = st.sampled_from([1.0, 0.5, 1 / 3, 0.3, 0.7, 0.25, 0.1, 0.9])


def frames_from(gaps_s: list[float]) -> list[Frame]:
    times_s, now = [0.0], 0.0
    for gap in gaps_s:
        now += gap
        times_s.append(now)
    return [Frame(ONE_PIXEL, time_s) for time_s in times_s]


def rule(frames: list[Frame], t: int) -> Frame:
    """The rule, read literally: the newest frame that is not after `t`."""
    return [frame for frame in frames if frame.media_time_s <= t + FRAME_TOLERANCE_S][-1]


def play_all(frames: list[Frame], fps: float) -> list[DueTurn]:
    pacer, served = FramePacer(TurnSchedule(fps)), []
    for frame in [*frames, None]:
        known_s = horizon_before(frame) if frame else frames[-1].media_time_s
        while due := pacer.oldest_due(known_s):
            served.append(due)
        if frame:
            pacer.offer(frame)
    return served


@given(gaps, rates)
def test_every_turn_gets_the_newest_frame_that_is_not_after_its_second(gaps_s, fps):
    frames = frames_from(gaps_s)
    served = play_all(frames, fps)
    assert [due.frame for due in served] == [rule(frames, due.t) for due in served]
    assert [due.index for due in served] == list(range(len(served)))
    assert all(due.skipped_turns == 0 for due in served)


@given(gaps, rates, st.lists(st.floats(0.01, 7.0), min_size=70, max_size=70))
def test_in_real_time_the_turns_that_are_served_follow_the_same_rule_and_the_rest_is_counted(gaps_s, fps, work_s):
    """A session that takes `work_s` for its turns: whatever is skipped, the rule holds."""
    frames, schedule = frames_from(gaps_s), TurnSchedule(fps)
    end_s = frames[-1].media_time_s
    pacer, served, now_s, offered = FramePacer(schedule), [], 0.0, 0
    for busy_s in work_s:
        while offered < len(frames) and frames[offered].media_time_s <= now_s:
            pacer.offer(frames[offered])
            offered += 1
        due = pacer.newest_due(min(now_s, end_s))
        if due is None:
            later = [f.media_time_s for f in frames[offered : offered + 1]]
            now_s = max(now_s, min(float(pacer.next_second), *later)) if later else math.inf
            if now_s > end_s:
                break
            continue
        served.append(due)
        stream_s = min(now_s, end_s)
        assert due.t <= stream_s and schedule.second(due.index + 1) > stream_s - 1e-6, "not the newest turn"
        assert due.frame is rule([frame for frame in frames if frame.media_time_s <= now_s], due.t)
        now_s += busy_s
    if served:
        assert sum(due.skipped_turns for due in served) + len(served) == served[-1].index + 1


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(60000, 1001), Fraction(25), Fraction(7)])
def test_an_hour_at_any_camera_rate_does_not_drift(rate):
    """Counting 29 frames a second at 29.97 fps would run 117 s ahead after an hour."""
    pacer, served = FramePacer(TurnSchedule(1.0)), []
    for number in range(int(rate * 3600)):
        frame = Frame(ONE_PIXEL, float(number / rate))
        while due := pacer.oldest_due(horizon_before(frame)):
            served.append(due)
        pacer.offer(frame)
    assert [due.t for due in served] == list(range(len(served))) and len(served) == 3600
    worst_s = max(due.t - due.frame.media_time_s for due in served)
    assert -FRAME_TOLERANCE_S <= worst_s <= 1 / rate


@pytest.mark.parametrize(
    "fps, seconds",
    [
        (1.0, [0, 1, 2, 3, 4]),
        (0.5, [0, 2, 4, 6]),
        (0.3, [0, 3, 6, 10, 13]),
        (1 / 3, [0, 3, 6, 9]),
        (0.7, [0, 1, 2, 4, 5]),
    ],
)
def test_turns_come_at_whole_seconds(fps, seconds):
    assert [TurnSchedule(fps).second(index) for index in range(len(seconds))] == seconds


@given(rates, st.floats(0, 1e6))
def test_the_latest_turn_is_the_last_one_not_after_the_time(fps, stream_s):
    schedule = TurnSchedule(fps)
    index = schedule.latest_index(stream_s)
    assert schedule.second(index) <= stream_s + 1e-5 and schedule.second(index + 1) > stream_s


@pytest.mark.parametrize("fps", [0, -1, 1.01, 30, math.nan, math.inf])
def test_a_rate_outside_the_protocol_is_refused(fps):
    with pytest.raises(UsageError, match="turn rate") as caught:
        TurnSchedule(fps)
    assert "--fps 1" in caught.value.hint


def test_nothing_is_due_before_the_first_frame():
    assert FramePacer(TurnSchedule(1.0)).newest_due(5.0) is None


def test_a_stream_that_falls_silent_is_served_its_last_picture_again():
    pacer = FramePacer(TurnSchedule(1.0))
    pacer.offer(Frame(ONE_PIXEL, 0.0))
    assert [pacer.newest_due(float(t)).t for t in range(4)] == [0, 1, 2, 3]


def test_a_late_session_gets_the_newest_turn_with_the_frame_of_its_second():
    pacer = FramePacer(TurnSchedule(1.0))
    for number in range(134):
        pacer.offer(Frame(ONE_PIXEL, number / 25))
    due = pacer.newest_due(5.33)
    assert (due.t, due.skipped_turns, due.frame.media_time_s) == (5, 5, 5.0)
    assert pacer.newest_due(5.9) is None


def test_a_frame_older_than_its_forerunner_changes_nothing():
    pacer = FramePacer(TurnSchedule(1.0))
    pacer.offer(Frame(ONE_PIXEL, 3.0))
    pacer.offer(Frame(ONE_PIXEL, 1.0))
    assert pacer.newest_media_time_s == 3.0

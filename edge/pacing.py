"""Which frame serves which turn.

Owns the turns' times and the choice of frames, both from timestamps and never from counts. Does not know clocks,
threads or files: the caller says what stream time it is.

Turn k speaks of the whole second `floor(k / fps)`; its frame is the newest one whose media time is not after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge.errors import UsageError
from edge.frames import Frame

FRAME_TOLERANCE_S = 1e-3
"""A frame this little after a turn's second still counts as of it: containers round to milliseconds."""

_ROUNDING = 1e-6


def check_turn_rate(fps: float) -> float:
    """Return `fps` if turns can come at that rate.

    Raises:
      UsageError: not above 0, or above 1: the protocol's labels are whole seconds.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise UsageError(f"The turn rate should be above 0 and at most 1 fps, found {fps:g} fps", hint="Use `--fps 1`")
    if fps > 1:
        raise UsageError(
            f"The turn rate should be at most 1 fps, found {fps:g} fps: the protocol labels turns in whole seconds",
            hint="Use `--fps 1`",
        )
    return float(fps)


class TurnSchedule:
    """The stream seconds at which turns come: every `1 / fps` seconds, rounded down to whole ones."""

    def __init__(self, fps: float) -> None:
        self._fps = check_turn_rate(fps)

    @property
    def interval_s(self) -> float:
        return 1.0 / self._fps

    def second(self, index: int) -> int:
        """Stream second of turn `index`, counted from 0."""
        return math.floor(index / self._fps + _ROUNDING)

    def latest_index(self, stream_s: float) -> int:
        """The last turn at or before `stream_s`; -1 before the first."""
        if stream_s < 0:
            return -1
        index = math.floor(stream_s * self._fps) + 2
        while self.second(index) > stream_s + _ROUNDING:
            index -= 1
        return index


@dataclass(frozen=True)
class DueTurn:
    """A turn to serve: `t` its stream second, `skipped_turns` how many before it nobody will serve."""

    index: int
    t: int
    frame: Frame
    skipped_turns: int = 0


class FramePacer:
    """Holds the two frames that the next turn can need, whatever the rate of the stream.

    `oldest_due` serves every turn; `newest_due` leaves out those that are too late, so that nothing queues.
    """

    def __init__(self, schedule: TurnSchedule) -> None:
        self.schedule = schedule
        self._next_index = 0
        self._newest: Frame | None = None
        self._held: Frame | None = None  # the frame of the last turn at or before the newest frame

    @property
    def next_second(self) -> int:
        """Stream second of the first turn not served yet."""
        return self.schedule.second(self._next_index)

    @property
    def newest_media_time_s(self) -> float | None:
        """Media time of the newest frame offered."""
        return self._newest.media_time_s if self._newest is not None else None

    def offer(self, frame: Frame) -> None:
        """Take note of the next frame of the stream; one older than its forerunner is ignored."""
        if self._newest is not None and frame.media_time_s < self._newest.media_time_s:
            return
        turn_s = self.schedule.second(self.schedule.latest_index(frame.media_time_s + FRAME_TOLERANCE_S))
        for candidate in (self._newest, frame):
            if candidate is not None and candidate.media_time_s <= turn_s + FRAME_TOLERANCE_S:
                self._held = candidate
        self._newest = frame

    def oldest_due(self, stream_s: float) -> DueTurn | None:
        """The first turn not served, if its second has come and it has a frame."""
        return self._serve(self._next_index, stream_s)

    def newest_due(self, stream_s: float) -> DueTurn | None:
        """The last turn whose second has come; the unserved ones before it are skipped for good."""
        return self._serve(max(self._next_index, self.schedule.latest_index(stream_s)), stream_s)

    def _serve(self, index: int, stream_s: float) -> DueTurn | None:
        t = self.schedule.second(index)
        frame = self._frame_of(t)
        if frame is None or index > self.schedule.latest_index(stream_s):
            return None
        skipped, self._next_index = index - self._next_index, index + 1
        return DueTurn(index, t, frame, skipped)

    def _frame_of(self, t: int) -> Frame | None:
        for frame in (self._newest, self._held):
            if frame is not None and frame.media_time_s <= t + FRAME_TOLERANCE_S:
                return frame
        return None


def horizon_before(frame: Frame) -> float:
    """The stream time up to which all frames are known when `frame` is the next one to be offered."""
    return frame.media_time_s - 1.5 * FRAME_TOLERANCE_S

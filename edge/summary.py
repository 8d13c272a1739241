"""What a run amounts to: counts and stage times, in fixed memory. Does not measure anything itself."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_SAMPLES = 100_000
"""Times kept per stage: more than a day of turns. Beyond that the newest stay."""


class StageTimes:
    """Times per stage in milliseconds; exact up to `MAX_SAMPLES` turns, then over the newest that many."""

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max_samples = max_samples
        self._samples_ms: dict[str, deque[float]] = {}

    def add(self, times_ms: dict[str, float]) -> None:
        """Take note of one turn."""
        for stage, time_ms in times_ms.items():
            self._samples_ms.setdefault(stage, deque(maxlen=self._max_samples)).append(float(time_ms))

    def stages(self) -> Iterable[str]:
        """Names of the stages seen, in the order of their first time."""
        return self._samples_ms.keys()

    def samples_ms(self, stage: str) -> list[float]:
        """The times of `stage`, oldest first; empty for a stage never seen."""
        return list(self._samples_ms.get(stage, ()))

    def percentile_ms(self, stage: str, percent: float) -> float:
        """The time that `percent` of the turns do not exceed (nearest rank); NaN for a stage never seen."""
        ordered = sorted(self._samples_ms.get(stage, ()))
        if not ordered:
            return math.nan
        return ordered[min(len(ordered) - 1, max(0, math.ceil(percent / 100 * len(ordered)) - 1))]


@dataclass
class RunSummary:
    """The outcome of `run_stream`.

    Attributes:
      turns: turns that the session served.
      responses: turns in which the model spoke.
      dropped_turns: turns left out because an earlier one took too long.
      dropped_frames: frames of a live source, or of a recording that is read too slowly, left out unread.
      questions_left: questions whose second never came.
      end_reason: `ended` (the source is over), `stopped`, `interrupted`, `max_turns`, or `error`.
      stream_s: stream time of the last turn's end; wall_s: how long the run took.
      turn_interval_s: a turn comes every so many seconds of the stream; realtime: the clock set the pace.
      times: `preprocess`, `encode`, `append`, `decode`, `turn` of every turn, and, of those in which the model spoke,
        `first_text` (turn's start to its first words) and, in real time, `frame_to_event`.
      warnings: what went wrong without ending the run, for people.
    """

    turns: int = 0
    responses: int = 0
    dropped_turns: int = 0
    dropped_frames: int = 0
    questions_left: int = 0
    end_reason: str = "error"
    stream_s: float = 0.0
    wall_s: float = 0.0
    turn_interval_s: float = 1.0
    realtime: bool = False
    times: StageTimes = field(default_factory=StageTimes)
    warnings: list[str] = field(default_factory=list)

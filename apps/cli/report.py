"""What is told at the end of a run: counts, stage times, and how much faster than real time it was.

Owns the words and the JSON keys. Measures nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TextIO

from apps.cli import console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.summary import RunSummary

STAGES = ("preprocess", "encode", "append", "decode", "turn", "first_text")
_NAMES = {"first_text": "first words", "turn": "whole turn"}


def summary_json(summary: RunSummary) -> dict[str, Any]:
    """A run's figures as JSON values; stages that never happened are left out."""
    times_ms = {}
    for stage in summary.times.stages():
        p50_ms, p95_ms = (summary.times.percentile_ms(stage, percent) for percent in (50, 95))
        times_ms[stage] = {"p50": round(p50_ms, 2), "p95": round(p95_ms, 2)}
    return {
        "turns": summary.turns,
        "responses": summary.responses,
        "dropped_turns": summary.dropped_turns,
        "dropped_frames": summary.dropped_frames,
        "questions_left": summary.questions_left,
        "end_reason": summary.end_reason,
        "stream_s": summary.stream_s,
        "wall_s": round(summary.wall_s, 3),
        "times_ms": times_ms,
        "turn_interval_s": summary.turn_interval_s,
        "times_faster_than_real_time": _headroom(summary),
        "wall_times_faster_than_real_time": _wall_headroom(summary),
    }


def _headroom(summary: RunSummary) -> float | None:
    """How often the median turn fits between two turns; None before the first turn."""
    turn_ms = summary.times.percentile_ms("turn", 50)
    return round(1e3 * summary.turn_interval_s / turn_ms, 1) if turn_ms > 0 else None


def _wall_headroom(summary: RunSummary) -> float | None:
    """Stream time over the time that all of it took; None where the clock set the pace."""
    return None if summary.realtime or summary.wall_s <= 0 else round(summary.stream_s / summary.wall_s, 1)


def print_summary(summary: RunSummary, file: TextIO) -> None:
    """The run as one table."""
    rows = [
        (_NAMES.get(stage, stage), *(_milliseconds(summary.times.percentile_ms(stage, p)) for p in (50, 95)))
        for stage in STAGES
        if summary.times.samples_ms(stage)
    ]
    parts = [f"{summary.turns} turns", f"{summary.responses} responses"]
    if summary.dropped_turns:
        parts.append(f"{summary.dropped_turns} turns left out because they came too late")
    console.table(", ".join(parts), ("time of a turn", "p50 ms", "p95 ms"), rows, file)
    for line in _headroom_lines(summary):
        print(line, file=file, flush=True)


def _headroom_lines(summary: RunSummary) -> Iterator[str]:
    headroom, wall_headroom = _headroom(summary), _wall_headroom(summary)
    if headroom is not None:
        turn_ms = summary.times.percentile_ms("turn", 50)
        yield (
            f"A turn takes {turn_ms:.1f} ms at the median and there is one every {summary.turn_interval_s:g} s: "
            f"{_times(headroom)} real time"
        )
    if wall_headroom is not None and summary.turns:
        yield (
            f"{summary.stream_s:g} s of stream took {summary.wall_s:.1f} s, pictures and outputs included: "
            f"{_times(wall_headroom)} real time"
        )


def _times(factor: float) -> str:
    return f"{factor:g} times faster than" if factor > 1 else f"only {factor:g} times"


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"

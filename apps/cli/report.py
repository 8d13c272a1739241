"""What is told at the end of a run: counts, stage times, and how much faster than real time it was.

Owns the words and the JSON keys. Measures nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TextIO

from apps.cli import console

if TYPE_CHECKING:
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
        "times_faster_than_real_time": _headroom(summary),
    }


def _headroom(summary: RunSummary) -> float | None:
    """Stream time over the time that the turns took; None before the first turn."""
    busy_s = sum(summary.times.samples_ms("turn")) / 1e3
    return round(summary.stream_s / busy_s, 1) if busy_s > 0 else None


def print_summary(summary: RunSummary, file: TextIO) -> None:
    """The run as one table."""
    rows = [
        (_NAMES.get(stage, stage), *(_milliseconds(summary.times.percentile_ms(stage, p)) for p in (50, 95)))
        for stage in STAGES
        if summary.times.samples_ms(stage)
    ]
    headroom = _headroom(summary)
    parts = [f"{summary.turns} turns", f"{summary.responses} responses"]
    if summary.dropped_turns:
        parts.append(f"{summary.dropped_turns} turns left out because they came too late")
    if headroom is not None:
        parts.append(f"{headroom:g} times faster than real time")
    console.table(", ".join(parts), ("time of a turn", "p50 ms", "p95 ms"), rows, file)


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"

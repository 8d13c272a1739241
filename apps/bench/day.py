"""A simulated day: does a stream stay as fast, as small and as good as it began?

Owns the measurement: one session, one question asked at the first second and never again, tens of thousands of turns
paced as fast as they go. The pictures are scenes of the demonstration's world, one after the other, whose true answers
are known; another process draws them, so that time and memory are those of the session alone.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench.machine import available_cores, machine_card
from edge.errors import UsageError

TURNS_AN_HOUR = 3600
SCENE_TURNS = 300
FRAMES_AHEAD = 4
SETTLED_TURNS = 1000
"""Memory and turn time count from here on; the window has long been full then."""

Progress = Callable[[str, float, float], None]


@dataclass
class Hour:
    """One hour of stream time, or the part of it that was run."""

    scores: Any
    times_ms: list[float] = field(default_factory=list)
    resident_mib: float = 0.0

    def figures(self) -> dict[str, Any]:
        report = self.scores.report()
        return {
            "turns": len(self.times_ms),
            "response_f1": round(report["response_f1"], 4),
            "state_accuracy": round(report["state_accuracy"], 4),
            "turn_ms": round(statistics.median(self.times_ms), 3),
            "turn_p10_ms": round(_quantile(self.times_ms, 0.1), 3),
            "turn_p95_ms": round(_quantile(self.times_ms, 0.95), 3),
            "resident_mib": round(self.resident_mib, 2),
        }


def measure(
    bundle_path: Path,
    *,
    turns: int,
    window_turns: int | None,
    policy: str | None,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Run the day.

    Returns:
      `hours` with their figures, and over all: `resident_growth_mib` since turn 1,000 (the peak, not the end),
      `turn_time_ratio` of the last 1,000 turns to the 1,000 after turn 1,000, by median and by the lower tenth,
      `response_f1` of the first and of the last hour.

    Raises:
      UsageError: fewer turns than can be compared.
    """
    if turns < 3 * SETTLED_TURNS:
        raise UsageError(f"A day is compared from turn {SETTLED_TURNS} on: at least {3 * SETTLED_TURNS} turns are "
                         f"needed, found {turns}")  # fmt: skip
    import edge

    threads = threads or available_cores()
    bundle = edge.open_bundle(bundle_path)
    session = edge.StreamSession(bundle, window_turns=window_turns, threads=threads, policy=policy)
    log = DayLog(turns)
    answers: list[tuple[str, str]] = []
    for t, (pixels, scene) in enumerate(_frames(turns, seed)):
        if t == 0:
            session.ask(scene.question)
        start_ns = time.perf_counter_ns()
        turn = session.push(pixels, t)
        log.add_turn(t, (time.perf_counter_ns() - start_ns) / 1e6)
        answers.append((turn.state.value, turn.text))
        if len(answers) == len(scene.truth):
            log.hours[-1].scores.add(answers, scene.truth)
            answers = []
            progress("turns", t + 1, turns)
    return {
        "turns": turns,
        "policy": session.policy,
        "window_turns": session.window_turns,
        "kv_capacity_tokens": session.kv_capacity_tokens,
        **log.summary(),
        "machine": machine_card(threads),
    }


class DayLog:
    """Collects a day's turn times, memory and scores."""

    def __init__(self, turns: int) -> None:
        self._turns = turns
        self.hours: list[Hour] = []
        self._early_ms: list[float] = []
        self._late_ms: list[float] = []
        self._settled_mib = self._most_mib = 0.0

    def add_turn(self, t: int, elapsed_ms: float) -> None:
        """Take note of turn `t`."""
        from apps.demo.metrics import Scores

        if t % TURNS_AN_HOUR == 0:
            self.hours.append(Hour(Scores()))
        self.hours[-1].times_ms.append(elapsed_ms)
        if SETTLED_TURNS <= t < 2 * SETTLED_TURNS:
            self._early_ms.append(elapsed_ms)
        if t >= self._turns - SETTLED_TURNS:
            self._late_ms.append(elapsed_ms)
        if t == SETTLED_TURNS:
            self._settled_mib = self._most_mib = resident_mib()
        elif t > SETTLED_TURNS and (t % 100 == 0 or t == self._turns - 1):
            self.hours[-1].resident_mib = resident_mib()
            self._most_mib = max(self._most_mib, self.hours[-1].resident_mib)

    def summary(self) -> dict[str, Any]:
        """See `measure`."""
        figures = [hour.figures() for hour in self.hours]
        early, late = self._early_ms, self._late_ms
        return {
            "resident_mib_at_1000": round(self._settled_mib, 2),
            "resident_growth_mib": round(self._most_mib - self._settled_mib, 2),
            "turn_ms_at_1000": round(statistics.median(early), 3),
            "turn_ms_at_end": round(statistics.median(late), 3),
            "turn_time_ratio": round(statistics.median(late) / statistics.median(early), 4),
            "turn_time_ratio_p10": round(_quantile(late, 0.1) / _quantile(early, 0.1), 4),
            "response_f1_first_hour": figures[0]["response_f1"],
            "response_f1_last_hour": figures[-1]["response_f1"],
            "hours": figures,
        }


@dataclass(frozen=True)
class Scene:
    """What is true of one scene."""

    question: str
    truth: list[Any]


def _frames(turns: int, seed: int) -> Iterator[tuple[np.ndarray, Scene]]:
    """The picture of each turn with the scene it belongs to, drawn a few ahead by another process."""
    context = multiprocessing.get_context("spawn")
    drawn = context.Queue(FRAMES_AHEAD)
    painter = context.Process(target=_draw, args=(turns, seed, drawn), daemon=True)
    painter.start()
    try:
        for _ in range(0, turns, SCENE_TURNS):
            scene = drawn.get()
            for _ in scene.truth:
                yield drawn.get(), scene
    finally:
        painter.terminate()


def _draw(turns: int, seed: int, drawn: Any) -> None:
    """Scenes that follow each other, labelled for one question: each scene, then its pictures."""
    from apps.demo.labels import Question, label_turns
    from apps.demo.phrases import NARRATION, NARRATION_QUESTIONS
    from apps.demo.world import make_stream

    question = NARRATION_QUESTIONS[0]
    for number, first_turn in enumerate(range(0, turns, SCENE_TURNS)):
        stream = make_stream(seed + number, NARRATION, duration_s=min(SCENE_TURNS, turns - first_turn))
        drawn.put(Scene(question, label_turns(stream.script, {0: Question(NARRATION, question)})))
        for t in range(stream.duration_s):
            drawn.put(stream.render(t))


def resident_mib() -> float:
    """Resident memory of this process, from /proc; 0 where there is none."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    import resource

    return pages * resource.getpagesize() / 2**20


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]

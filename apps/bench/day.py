"""A simulated day: does a stream stay as fast, as small and as good as it began?

Owns the measurement: one session, one question asked at the first second and never again, tens of thousands of turns
paced as fast as they go. The pictures are scenes of the demonstration's world, one after the other, whose true answers
are known; another process draws them, so that time and memory are those of the session alone. The last scenes are the
first ones again, up to an hour of them: quality then differs by what the stream has become, not by what it was shown.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
Report = Callable[[dict[str, Any]], None]


def measure(
    bundle_path: Path,
    *,
    turns: int,
    window_turns: int | None,
    policy: str | None,
    threads: int | None,
    seed: int,
    progress: Progress,
    report: Report,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the day.

    Args:
      options: further ones of the session: its backend.
      seed: of the first scene.
      report: given each hour's figures as soon as it is over, so that an interrupted day is not lost.

    Returns:
      `hours` with their figures, and over all: `resident_growth_mib` since turn 1,000 (the peak, not the end),
      `turn_time_ratio` of the last 1,000 turns to the 1,000 after turn 1,000, by median and by the lower tenth,
      `response_f1_first` and `response_f1_last` over the scenes that are shown at both ends.

    Raises:
      UsageError: fewer turns than can be compared.
    """
    if turns < 3 * SETTLED_TURNS:
        raise UsageError(f"A day is compared from turn {SETTLED_TURNS} on: at least {3 * SETTLED_TURNS} turns are "
                         f"needed, found {turns}")  # fmt: skip
    import edge

    threads = threads or available_cores()
    bundle = edge.open_bundle(bundle_path)
    session = edge.StreamSession(bundle, window_turns=window_turns, threads=threads, policy=policy, **(options or {}))
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
            log.add_scene(scene, answers)
            answers = []
            progress("turns", t + 1, turns)
        if (t + 1) % TURNS_AN_HOUR == 0 or t + 1 == turns:
            report(log.end_hour())
    return {
        "turns": turns,
        "policy": session.policy,
        "window_turns": session.window_turns,
        "kv_capacity_tokens": session.kv_capacity_tokens,
        **log.summary(),
        "machine": machine_card(threads),
    }


class DayLog:
    """Collects a day's turn times, memory and scores, in memory that is allocated at its start."""

    def __init__(self, turns: int) -> None:
        from apps.demo.metrics import Scores

        self._new_scores = Scores
        self._times_ms = np.full(turns, np.nan)  # filled, so that taking note of a turn takes no new page
        self._turns_done = 0
        self._hours: list[dict[str, Any]] = []
        self._hour_scores, self._first_scores, self._last_scores = Scores(), Scores(), Scores()
        self._scenes, self._scenes_done = -(-turns // SCENE_TURNS), 0
        self._settled_mib = self._most_mib = 0.0

    def add_turn(self, t: int, elapsed_ms: float) -> None:
        """Take note of turn `t`."""
        self._times_ms[t] = elapsed_ms
        self._turns_done = t + 1
        if t == SETTLED_TURNS:
            self._settled_mib = self._most_mib = resident_mib()
        elif t > SETTLED_TURNS and t % 100 == 0:
            self._most_mib = max(self._most_mib, resident_mib())

    def add_scene(self, scene: Scene, answers: list[tuple[str, str]]) -> None:
        """Take note of what was said about a scene that is over."""
        self._hour_scores.add(answers, scene.truth)
        repeated = repeated_scenes(self._scenes)
        if self._scenes_done < repeated:
            self._first_scores.add(answers, scene.truth)
        if self._scenes_done >= self._scenes - repeated:
            self._last_scores.add(answers, scene.truth)
        self._scenes_done += 1

    def end_hour(self) -> dict[str, Any]:
        """The figures of the hour, or part of one, that is over."""
        times_ms = self._times_ms[len(self._hours) * TURNS_AN_HOUR : self._turns_done]
        resident = resident_mib()
        self._most_mib = max(self._most_mib, resident)
        scores, self._hour_scores = self._hour_scores.report(), self._new_scores()
        self._hours.append(
            {
                "hour": len(self._hours),
                "turns": len(times_ms),
                "response_f1": round(scores["response_f1"], 4),
                "state_accuracy": round(scores["state_accuracy"], 4),
                "turn_ms": _percentile(times_ms, 50),
                "turn_p10_ms": _percentile(times_ms, 10),
                "turn_p95_ms": _percentile(times_ms, 95),
                "resident_mib": round(resident, 2),
            }
        )
        return self._hours[-1]

    def summary(self) -> dict[str, Any]:
        """See `measure`."""
        early = self._times_ms[SETTLED_TURNS : 2 * SETTLED_TURNS]
        late = self._times_ms[-SETTLED_TURNS:]
        return {
            "resident_mib_at_1000": round(self._settled_mib, 2),
            "resident_growth_mib": round(self._most_mib - self._settled_mib, 2),
            "turn_ms_at_1000": _percentile(early, 50),
            "turn_ms_at_end": _percentile(late, 50),
            "turn_time_ratio": round(_percentile(late, 50) / _percentile(early, 50), 4),
            "turn_time_ratio_p10": round(_percentile(late, 10) / _percentile(early, 10), 4),
            "response_f1_first": round(self._first_scores.report()["response_f1"], 4),
            "response_f1_last": round(self._last_scores.report()["response_f1"], 4),
            "repeated_scenes": repeated_scenes(self._scenes),
            "hours": self._hours,
        }


def repeated_scenes(scenes: int) -> int:
    """How many scenes are shown again at the end: an hour of them, or half of a shorter day."""
    return min(TURNS_AN_HOUR // SCENE_TURNS, scenes // 2)


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
    scenes = -(-turns // SCENE_TURNS)
    first_repeated = scenes - repeated_scenes(scenes)
    for number, first_turn in enumerate(range(0, turns, SCENE_TURNS)):
        stream = make_stream(seed + number % first_repeated, NARRATION, duration_s=min(SCENE_TURNS, turns - first_turn))
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


def _percentile(values_ms: np.ndarray, percent: float) -> float:
    return round(float(np.percentile(values_ms, percent)), 3)

"""Timing things against each other on a machine whose speed changes from one second to the next.

Owns the order of measurements: everybody gets a turn in every round, so that a busy moment favours nobody. Knows
nothing of what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SETTLE_S = 0.02
"""Before each sample, so that the threads of whoever came before have stopped spinning."""
LEAST_SAMPLE_MS = 5.0
FASTEST, PEAK = "the fastest", "of peak"


@dataclass(frozen=True)
class Contestant:
    """Something to time: `run` makes `calls` calls, over different memory where that matters."""

    run: Callable[[], object]
    calls: int = 1

    def warm_up(self) -> Callable[[], float]:
        """Run it for the first time. Returns what takes one sample: microseconds of one call."""
        repeats = _repeats(self)

        def sample_us() -> float:
            time.sleep(SETTLE_S)
            return _elapsed_s(self.run, repeats) * 1e6 / self.calls / repeats

        return sample_us


@dataclass(frozen=True)
class SelfTimed:
    """Something that takes its own time: `measure_us` makes `calls` calls and says their microseconds."""

    measure_us: Callable[[], float]
    calls: int = 1

    def warm_up(self) -> Callable[[], float]:
        """As `Contestant.warm_up`."""
        self.measure_us()
        return lambda: self.measure_us() / self.calls


@dataclass
class Times:
    """Microseconds of one call, a number for each round."""

    us: list[float] = field(default_factory=list)

    @property
    def least(self) -> float:
        return min(self.us)

    @property
    def median(self) -> float:
        return statistics.median(self.us)


def interleave(contestants: Mapping[str, Contestant | SelfTimed], rounds: int) -> dict[str, Times]:
    """Time everybody `rounds` times, in turns, after one call each to warm up."""
    times = {name: Times() for name in contestants}
    samples_us = {name: contestant.warm_up() for name, contestant in contestants.items()}
    for _ in range(rounds):
        for name, sample_us in samples_us.items():
            times[name].us.append(sample_us())
    return times


def _repeats(contestant: Contestant) -> int:
    """How often to run it for one sample that a clock can tell."""
    contestant.run()
    elapsed_ms = _elapsed_s(contestant.run, 1) * 1e3
    return max(1, round(LEAST_SAMPLE_MS / max(elapsed_ms, 1e-3)))


def _elapsed_s(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """What one call has to do at least, and which of the machine's peaks bounds it.

    Attributes:
      operations: a multiply and an add are two.
      bytes: of weights or cache that have to be read.
      bound: `int8_gops`, `f32_gops` or `read_gbs`.
    """

    operations: float
    bytes: float
    bound: str


def row(
    name: str,
    shape: str,
    threads: int,
    times: Mapping[str, Times],
    work: Work,
    goals: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One line of the report, as JSON values. `times` holds `ours`, and the others by their names.

    The one that counts as `stock` is the fastest of the others. Ratios are of minima.

    Args:
      goals: wanted ratios by the other's name, or under FASTEST; under PEAK the wanted fraction of the bound.
    """
    ours = times["ours"]
    others = {other: found for other, found in times.items() if other != "ours"}
    stock = min(others, key=lambda other: others[other].least)
    found = {other: others[other].least / ours.least for other in others}
    found[FASTEST] = found[stock]
    return {
        "name": name,
        "shape": shape,
        "threads": threads,
        "ours_us": round(ours.least, 1),
        "ours_us_median": round(ours.median, 1),
        "stock": stock,
        "stock_us": round(others[stock].least, 1),
        "stock_us_median": round(others[stock].median, 1),
        "speedup": round(found[stock], 2),
        "gbs": round(work.bytes / ours.least / 1e3, 2),
        "gops": round(work.operations / ours.least / 1e3, 1),
        "bound": work.bound,
        "fraction_of_peak": None,
        "others_us": {other: round(times.least, 1) for other, times in others.items()},
        "others_us_median": {other: round(times.median, 1) for other, times in others.items()},
        "goals": {
            goal: {"wanted": wanted, "found": round(found.get(goal, 0.0), 3), "reached": found.get(goal, 0.0) >= wanted}
            for goal, wanted in (goals or {}).items()
            if goal in found or goal == PEAK
        },
    }


def add_fraction_of_peak(line: dict[str, Any], peaks: Mapping[str, float]) -> None:
    """Fill in what needs the machine's peaks, which are only known when all is over: the best that was seen."""
    achieved = line["gbs"] if line["bound"] == "read_gbs" else line["gops"]
    line["fraction_of_peak"] = fraction = round(achieved / peaks[line["bound"]], 3)
    if PEAK in line["goals"]:
        goal = line["goals"][PEAK]
        goal |= {"found": fraction, "reached": fraction >= goal["wanted"]}

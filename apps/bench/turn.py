"""What one turn of a long stream costs: ours, and the official loop that sends the whole window again each second.

Owns the measurement. Both get the same frames, the same question and the same history; the two are measured in turns
so that a busy moment of the machine does not favour one of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench.machine import available_cores, machine_card
from edge.errors import UsageError

DEPTHS_TURNS = (10, 30, 120)
NEIGHBOURS_TURNS = 5
"""Our turns are short, so each repeat takes the turns just before a depth as well, for more samples."""
WINDOW_TURNS = 120
MAX_REPLY_TOKENS = 8
"""Turns with a reply are not timed, so replies are kept short."""

Progress = Callable[[str, float, float], None]


@dataclass
class Samples:
    """Turn times in milliseconds, by depth in turns; only turns in which the model said nothing count."""

    ours: dict[int, list[float]] = field(default_factory=lambda: {depth: [] for depth in DEPTHS_TURNS})
    resend: dict[int, list[float]] = field(default_factory=lambda: {depth: [] for depth in DEPTHS_TURNS})
    spoken_turns: int = 0

    def add(self, loop: str, depth: int, elapsed_ms: float, *, spoken: bool) -> None:
        """Take note of one turn of `ours` or `resend`."""
        if spoken:
            self.spoken_turns += 1
        else:
            getattr(self, loop)[depth].append(elapsed_ms)


def silent_stream(turns: int, seed: int) -> tuple[list[np.ndarray], str]:
    """Frames of the demonstration's world, and a question about something that never happens there.

    Returns:
      ([(H, W, 3) uint8] * turns, question).
    """
    from apps.demo import phrases
    from apps.demo.world import make_stream

    stream = make_stream(seed, phrases.GROUNDING, duration_s=turns + 1)
    seen = {event.thing for event in stream.events}
    absent = next((thing for thing in range(len(phrases.OBJECTS)) if thing not in seen), 0)
    question = phrases.GROUNDING_QUESTION.format(caption=phrases.caption_event("put", absent))
    return [stream.render(t) for t in range(turns)], question


def time_ours(session: Any, frames: Sequence[np.ndarray], question: str, samples: Samples) -> None:
    """Play the stream through our session from its start, adding the turn times around each depth to `samples`."""
    session.reset()
    session.ask(question)
    for t, frame in enumerate(frames):
        start_ns = time.perf_counter_ns()
        turn = session.push(frame, t)
        elapsed_ms = (time.perf_counter_ns() - start_ns) / 1e6
        for depth in DEPTHS_TURNS:
            if depth - NEIGHBOURS_TURNS <= t < depth:
                samples.add("ours", depth, elapsed_ms, spoken=bool(turn.text))


def time_resend(loop: Any, frames: Sequence[np.ndarray], question: str, depth: int, samples: Samples) -> None:
    """Time the official loop's turn number `depth`.

    It calls no model before the first question, so the question comes with the timed turn: the turns before it are
    sent again with their frames and a silent answer each, as in the middle of any quiet stream.
    """
    loop.reset()
    for t in range(depth - 1):
        loop.push(frames[t], t, None)
    start_ns = time.perf_counter_ns()
    _, text, _ = loop.push(frames[depth - 1], depth - 1, question)
    samples.add("resend", depth, (time.perf_counter_ns() - start_ns) / 1e6, spoken=bool(text))


def measure(
    bundle_path: Path,
    checkpoint: Path,
    *,
    repeats: int,
    threads: int | None,
    seed: int,
    progress: Progress,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time both loops on one stream.

    Args:
      options: further ones of our session: its backend.

    Returns:
      `ours_ms`, `resend_ms` and their minima by depth, `flatness`, `speedup`, sample counts and the machine.

    Raises:
      UsageError: transformers or torch is not installed, or the model spoke in every turn that was timed.
    """
    import edge

    threads = threads or available_cores()
    session = edge.StreamSession(
        edge.open_bundle(bundle_path),
        window_turns=WINDOW_TURNS,
        max_reply_tokens=MAX_REPLY_TOKENS,
        threads=threads,
        **(options or {}),
    )
    loop = _official_loop(checkpoint, threads)
    frames, question = silent_stream(max(DEPTHS_TURNS), seed)
    time_ours(session, frames, question, Samples())  # warm up both
    time_resend(loop, frames, question, DEPTHS_TURNS[0], Samples())
    samples = Samples()
    for repeat in range(repeats):
        progress("turns", repeat, repeats)
        time_ours(session, frames, question, samples)
        for depth in DEPTHS_TURNS:
            time_resend(loop, frames, question, depth, samples)
    progress("turns", repeats, repeats)
    return {**summarise(samples), "repeats": repeats, "machine": machine_card(threads)}


def _official_loop(checkpoint: Path, threads: int) -> Any:
    try:
        from apps.demo.official_loop import OfficialLoop
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The official loop needs the package `{error.name}`, which is not installed",
            hint="In the checkout: pip install '.[export]'",
        ) from None
    return OfficialLoop(checkpoint, window_turns=WINDOW_TURNS, threads=threads)


def summarise(samples: Samples) -> dict[str, Any]:
    """Medians and minima by depth, and the two ratios of medians."""
    for depth in DEPTHS_TURNS:
        if not samples.ours[depth] or not samples.resend[depth]:
            raise UsageError(f"The model spoke in every turn that was timed around turn {depth}", hint="Try `--seed 8`")
    first, last = DEPTHS_TURNS[0], DEPTHS_TURNS[-1]
    ours = {depth: statistics.median(times) for depth, times in samples.ours.items()}
    resend = {depth: statistics.median(times) for depth, times in samples.resend.items()}
    return {
        "ours_ms": _by_turn(ours),
        "resend_ms": _by_turn(resend),
        "ours_min_ms": _by_turn({depth: min(times) for depth, times in samples.ours.items()}),
        "resend_min_ms": _by_turn({depth: min(times) for depth, times in samples.resend.items()}),
        "flatness": round(ours[last] / ours[first], 4),
        "speedup": round(resend[last] / ours[last], 2),
        "n_ours": _by_turn({depth: len(times) for depth, times in samples.ours.items()}),
        "n_resend": _by_turn({depth: len(times) for depth, times in samples.resend.items()}),
        "spoken_turns_left_out": samples.spoken_turns,
    }


def _by_turn(values: dict[int, float]) -> dict[str, float]:
    return {str(depth): round(value, 3) for depth, value in values.items()}

"""Runs streams of the demonstration world through any runtime and scores the answers.

Owns which streams are run and the control. `python -m apps.demo.evaluate` measures a checkpoint with the re-send loop.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.demo.metrics import Scores
from apps.demo.world import Stream, make_stream

if TYPE_CHECKING:
    from edge.session import StreamSession
    from edge.turn import Turn

CONTROL_SEED_STEP = 400_009


def with_other_frames(stream: Stream) -> Stream:
    """The same questions and true answers with the pictures of another stream of the same task."""
    other = make_stream(stream.seed + CONTROL_SEED_STEP, stream.task, stream.duration_s)
    return replace(stream, script=other.script, look=other.look, _renderer=None)


def run_session(session: StreamSession, stream: Stream) -> list[Turn]:
    """Every turn of a stream from its start, with the model's own answers in its history."""
    session.reset()
    turns = []
    for t in range(stream.duration_s):
        if t in stream.questions:
            session.ask(stream.questions[t])
        turns.append(session.push(stream.render(t), t))
    return turns


def evaluate(
    run_stream: Callable[[Stream], list[tuple[str, str]]],
    seeds: Iterable[int],
    control: bool = False,
    progress: Callable[[int, dict], None] | None = None,
) -> dict:
    """Score a runtime on the streams of `seeds`; tasks take turns with the seed.

    Args:
      run_stream: answers (state, text) of every turn of a stream, free-running.
      seeds: any; training uses none below 1,000,000.
      control: show the pictures of another stream. A model that looks must fail.
      progress: called after each stream with its seed and the figures so far.

    Returns:
      See `metrics.Scores.report`.
    """
    scores = Scores()
    for seed in seeds:
        stream = make_stream(seed)
        answers = run_stream(with_other_frames(stream) if control else stream)
        scores.add(answers, stream.truth, min(stream.questions))
        if progress:
            progress(seed, scores.report())
    return scores.report()


_loop: Any = None  # of each worker process


def _start(checkpoint: str, cache_vision: bool, threads: int) -> None:
    global _loop
    from apps.demo.official_loop import OfficialLoop

    _loop = OfficialLoop(checkpoint, cache_vision=cache_vision, threads=threads)


def _answer(stream: Stream) -> list[tuple[str, str]]:
    from apps.demo.official_loop import run_official

    return run_official(_loop, stream)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint with the re-send loop in transformers, fp32.")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--seeds", default="50000:50050", help="first:last, last excluded")
    parser.add_argument("--control", action="store_true", help="show the pictures of another stream")
    parser.add_argument("--cache-vision", action="store_true", help="encode each frame once")
    parser.add_argument("--workers", type=int, default=2, help="streams side by side, one thread each")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition(":")
    seeds = range(int(first), int(last))
    streams = [make_stream(seed) for seed in seeds]
    shown = [with_other_frames(stream) for stream in streams] if arguments.control else streams
    context = multiprocessing.get_context("spawn")
    start = (str(arguments.checkpoint), arguments.cache_vision, 1)
    scores = Scores()
    with context.Pool(arguments.workers, _start, start) as pool:
        for stream, answers in zip(streams, pool.imap(_answer, shown), strict=True):
            scores.add(answers, stream.truth, min(stream.questions))
            print(f"seed {stream.seed}: F1 so far {scores.report()['response_f1']:.3f}", file=sys.stderr)
    print(json.dumps(scores.report()))


if __name__ == "__main__":
    main()

"""`streamo-edge run`: a bundle watches a source and says what it has to say.

Owns the options of a run and the order in which its parts are made, so that what is wrong is told before it starts.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from apps.cli import console
from apps.cli.backend import add_backend, backend_options, say_where
from apps.cli.exits import INTERRUPTED
from apps.cli.parsing import closest, number, thread_count, turn_rate
from edge.errors import UsageError
from edge.policy import POLICIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge.session import StreamSession
    from edge.sinks import Sink
    from edge.turn import Turn


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="folder that `streamo-edge export` wrote")
    add("--source", required=True, metavar="S", help="video file, folder of pictures, camera or `synthetic:` scene")
    add("--ask", action="append", default=[], metavar="TEXT", help="a question from the start; may be repeated")
    add("--ask-at", action="append", default=[], nargs=2, metavar=("SECOND", "TEXT"), help="a question asked later")
    add(
        "--close-at",
        action="append",
        default=[],
        nargs=2,
        metavar=("SECOND", "TEXT"),
        help="a question, as it was asked, that needs no more answers from then on",
    )
    add("--output", action="append", default=[], metavar="F", help="a file ending in .jsonl, .vtt, .srt or .mp4")
    add("--fps", type=turn_rate, default=1.0, metavar="N", help="turns a second, at most 1; default 1")
    add("--pace", choices=("realtime", "fast"), default="realtime", help="default realtime")
    add("--seconds", type=number(float, above=0, unit="seconds"), metavar="N", help="stop after N seconds of stream")
    add(
        "--policy",
        choices=POLICIES,
        help="what a full window does: cut out its oldest turn, or start again without it, as the official loop does; "
        "default slide, where the native kernels are installed",
    )
    add("--window", type=number(int, at_least=1, unit="turns"), metavar="N", help="turns kept; default the bundle's")
    add_backend(parser)
    add("--threads", type=thread_count, metavar="N", help="threads of the backend")
    add("--max-reply-tokens", type=number(int, at_least=1), metavar="N", help="longer replies are cut")
    add("--temperature", type=number(float, at_least=0), default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-k", type=number(int, at_least=0), default=0, metavar="N", help="sample among the N likeliest tokens")
    add("--top-p", type=number(float, above=0), default=1.0, metavar="P", help="sample among tokens that sum up to P")
    add("--sampling-seed", type=number(int, at_least=0), default=0, metavar="N", help="default 0")
    add("--every-turn", action="store_true", help="an event for every turn, not only when the state changes")
    add("--json", action="store_true", help="end with the run's figures as one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.cli.report import print_summary, summary_json
    from apps.cli.synthetic import synthetic_source
    from edge.clock import SystemClock
    from edge.runtime import run_stream
    from edge.sources import open_source

    questions = parse_questions(args.ask, args.ask_at)
    closings = parse_closings(args.close_at, questions)
    clock = SystemClock()
    source = open_source(args.source, clock=clock, synthetic=synthetic_source)
    sinks = open_outputs(args.output, as_json=args.json, source=args.source)
    try:
        session = make_session(args)
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    with stopper(args.seconds, args.fps) as stop:
        summary = run_stream(
            session,
            source,
            questions=questions,
            closings=closings,
            sinks=sinks,
            fps=args.fps,
            pace=args.pace,
            clock=clock,
            stop=stop,
            on_turn=stop.after,
            on_warning=lambda text: console.say(f"warning: {text}"),
            every_turn=args.every_turn,
        )
    print_summary(summary, sys.stderr)
    if summary.questions_left:
        left = summary.questions_left
        console.say(f"warning: Questions never asked, because the stream ended before their second: {left}")
    if args.json:
        console.print_json(summary_json(summary))
    return INTERRUPTED if summary.end_reason == "interrupted" else 0


def parse_questions(asked: Sequence[str], asked_at: Sequence[Sequence[str]]) -> list[Any]:
    """Questions of a run, with their seconds.

    Raises:
      UsageError: none at all, an empty one, or a second that is not a number from 0.
    """
    from edge.runtime import Question

    questions = [Question(0.0, text) for text in asked]
    questions += [Question(_second("--ask-at", second), text) for second, text in asked_at]
    if not questions:
        raise UsageError("There is no question, so the model would never speak", hint='Add `--ask "What happens?"`')
    return questions


def parse_closings(closed_at: Sequence[Sequence[str]], questions: Sequence[Any]) -> list[Any]:
    """When which question is closed.

    Raises:
      UsageError: a second that is not a number from 0, or a question that nobody asks before it.
    """
    from edge.runtime import Closing

    closings = []
    for second, text in closed_at:
        closing = Closing(_second("--close-at", second), text.strip())
        asked = {q.text.strip(): q.at_s for q in sorted(questions, key=lambda q: -q.at_s)}  # the first time counts
        if closing.text not in asked:
            meant = closest(closing.text, asked)
            raise UsageError(
                f"Option --close-at: nobody asks {closing.text!r}",
                hint=f"Did you mean `{meant}`?" if meant else "Give the question's text as it is asked",
            )
        if asked[closing.text] > closing.at_s:
            raise UsageError(
                f"Option --close-at: {closing.text!r} is closed at {closing.at_s:g} s, "
                f"before it is asked at {asked[closing.text]:g} s",
                hint="Close it later",
            )
        closings.append(closing)
    return closings


def _second(option: str, text: str) -> float:
    try:
        return number(float, at_least=0, unit="seconds")(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"Option {option}: {error}", hint=f'For example `{option} 12 "What is it?"`') from None


def open_outputs(outputs: Sequence[str], *, as_json: bool, source: str = "") -> list[Sink]:
    """The files that were asked for, and always the text: on stdout, or with JSON on stderr.

    Raises:
      UsageError: an output is spelt wrongly, given twice, or the file that `source` names.
      OutputError: one cannot be written.
    """
    from edge.sinks import open_sinks
    from edge.sinks.text import TextSink

    files = [name for name in outputs if name != "-"]
    text: Sink = TextSink(console.report_stream(as_json))
    return [text, *(open_sinks(files, source=source) if files else [])]


def make_session(args: argparse.Namespace) -> StreamSession:
    """The session that the options ask for, all its memory allocated."""
    from apps.cli.budget import check_budget
    from edge import Sampling, StreamSession, open_bundle

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.sampling_seed)
    bundle = open_bundle(args.bundle)
    budget = check_budget(
        bundle,
        window_turns=args.window,
        max_reply_tokens=args.max_reply_tokens,
        policy=args.policy,
        backend=args.backend,
        fps=args.fps,
    )
    console.say(budget)
    session = StreamSession(
        bundle,
        policy=args.policy,
        window_turns=args.window,
        max_reply_tokens=args.max_reply_tokens,
        sampling=sampling,
        threads=args.threads,
        **backend_options(args),
    )
    say_where(session)
    return session


class Stop:
    """Whether the run should end: after so many seconds of stream, or when the system asks the process to go."""

    def __init__(self, seconds: float | None, fps: float) -> None:
        from edge.pacing import TurnSchedule

        self._seconds = math.inf if seconds is None else seconds
        self._schedule = TurnSchedule(fps)
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def after(self, turn: Turn) -> None:
        """Take note of a turn that is over."""
        following = self._schedule.second(self._schedule.latest_index(turn.t) + 1)
        if following >= self._seconds:
            self._asked = True

    def ask(self, *_: object) -> None:
        """End the run after the turn in progress."""
        self._asked = True


@contextmanager
def stopper(seconds: float | None = None, fps: float = 1.0) -> Iterator[Stop]:
    """A `Stop` that also heeds SIGTERM while the block runs."""
    stop = Stop(seconds, fps)
    previous = signal.signal(signal.SIGTERM, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)

"""`streamo-edge bench day`: a day of stream time, as fast as it goes."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from apps.cli import console
from apps.cli.backend import add_backend, backend_options
from apps.cli.bench_card import report
from apps.cli.bundles import add_bundle, chosen_bundle
from apps.cli.parsing import number, thread_count
from edge.errors import UsageError
from edge.policy import POLICIES

A_DAY_TURNS = 24 * 3600


def configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_backend(parser)
    parser.add_argument(
        "--turns", type=number(int, at_least=3000), default=A_DAY_TURNS, metavar="N", help=f"default {A_DAY_TURNS}"
    )
    parser.add_argument("--window", type=number(int, at_least=1, unit="turns"), metavar="N", help="window in turns")
    parser.add_argument("--policy", choices=POLICIES, help="what a full window does")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default all cores")
    parser.add_argument("--seed", type=number(int, at_least=0), default=90_000, metavar="N", help="of the first scene")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append each hour's figures as a line of JSON")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.bench.day import measure

    with ExitStack() as stack:
        log = stack.enter_context(_appended(args.log)) if args.log else None
        progress = stack.enter_context(console.progress())

        def log_hour(hour: dict[str, Any]) -> None:
            if log is not None:
                print(json.dumps(hour), file=log, flush=True)

        result = measure(
            chosen_bundle(args.bundle, progress),
            turns=args.turns,
            window_turns=args.window,
            policy=args.policy,
            threads=args.threads,
            seed=args.seed,
            progress=progress,
            report=log_hour,
            options=backend_options(args),
        )
    report(result, print_result, as_json=args.json)
    return 0


def _appended(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The log `{path}` cannot be written: {error.strerror}") from None


def print_result(result: dict[str, Any], file: Any) -> None:
    """Every hour, and the three answers."""
    headings = ("hour", "turns", "response f1", "turn ms", "p10", "p95", "resident MiB")
    names = ("hour", "turns", "response_f1", "turn_ms", "turn_p10_ms", "turn_p95_ms", "resident_mib")
    rows = [[str(hour[name]) for name in names] for hour in result["hours"]]
    console.table(f"{result['turns']} turns, window {result['window_turns']}, {result['policy']}", headings, rows, file)
    print(
        f"memory grew by {result['resident_growth_mib']} MiB after turn 1000; a turn takes "
        f"{result['turn_ms_at_end']} ms at the end, {result['turn_ms_at_1000']} ms after turn 1000 "
        f"(ratio {result['turn_time_ratio']}, {result['turn_time_ratio_p10']} by the lower tenth); response_f1 "
        f"{result['response_f1_first']} over the first {result['repeated_scenes']} scenes, "
        f"{result['response_f1_last']} over the same at the end",
        file=file,
        flush=True,
    )

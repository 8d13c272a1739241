"""`streamo-edge bench day`: a day of stream time, as fast as it goes."""

from __future__ import annotations

import argparse
from typing import Any

from apps.cli import console
from apps.cli.bench_card import print_card, warn_if_busy
from apps.cli.bundles import chosen_bundle
from apps.cli.parsing import number
from edge.policy import POLICIES

A_DAY_TURNS = 24 * 3600


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bundle", metavar="BUNDLE", help="folder that `streamo-edge export` wrote; default the shipped one"
    )
    parser.add_argument(
        "--turns", type=number(int, at_least=3000), default=A_DAY_TURNS, metavar="N", help=f"default {A_DAY_TURNS}"
    )
    parser.add_argument("--window", type=number(int, at_least=1, unit="turns"), metavar="N", help="window in turns")
    parser.add_argument("--policy", choices=POLICIES, help="what a full window does")
    parser.add_argument("--threads", type=number(int, at_least=1, at_most=1024), metavar="N", help="default all cores")
    parser.add_argument("--seed", type=number(int, at_least=0), default=90_000, metavar="N", help="of the first scene")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.bench.day import measure

    with console.progress() as progress:
        result = measure(
            chosen_bundle(args.bundle, progress),
            turns=args.turns,
            window_turns=args.window,
            policy=args.policy,
            threads=args.threads,
            seed=args.seed,
            progress=progress,
        )
    file = console.report_stream(args.json)
    print_card(result["machine"], file)
    warn_if_busy(result["machine"])
    print_result(result, file)
    if args.json:
        console.print_json(result)
    return 0


def print_result(result: dict[str, Any], file: Any) -> None:
    """Every hour, and the three answers."""
    headings = ("hour", "turns", "response f1", "turn ms", "p10", "p95", "resident MiB")
    names = ("turns", "response_f1", "turn_ms", "turn_p10_ms", "turn_p95_ms", "resident_mib")
    rows = [(str(i), *(str(hour[name]) for name in names)) for i, hour in enumerate(result["hours"])]
    console.table(f"{result['turns']} turns, window {result['window_turns']}, {result['policy']}", headings, rows, file)
    print(
        f"memory grew by {result['resident_growth_mib']} MiB after turn 1000; a turn takes "
        f"{result['turn_ms_at_end']} ms at the end, {result['turn_ms_at_1000']} ms after turn 1000 "
        f"(ratio {result['turn_time_ratio']}, {result['turn_time_ratio_p10']} by the lower tenth); response_f1 "
        f"{result['response_f1_first_hour']} in the first hour, {result['response_f1_last_hour']} in the last",
        file=file,
        flush=True,
    )

"""`streamo-edge bench`: what a turn costs on this machine, beside the official loop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apps.cli import console
from apps.cli.bundles import chosen_bundle
from apps.cli.parsing import number

DEMO_CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("turn",), help="`turn`: one second of a stream after 10, 30 and 120 of them")
    parser.add_argument(
        "--bundle", metavar="BUNDLE", help="folder that `streamo-edge export` wrote; default the shipped one"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=DEMO_CHECKPOINT,
        metavar="FOLDER",
        help="the checkpoint that the bundle was made from, for the official loop; default the shipped one",
    )
    parser.add_argument("--repeats", type=number(int, at_least=1), default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--threads", type=number(int, at_least=1, at_most=1024), metavar="N", help="for both; default all cores"
    )
    parser.add_argument("--seed", type=number(int, at_least=0), default=7, metavar="N", help="of the stream; default 7")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.bench.turn import measure

    with console.progress() as progress:
        result = measure(
            chosen_bundle(args.bundle, progress),
            args.checkpoint,
            repeats=args.repeats,
            threads=args.threads,
            seed=args.seed,
            progress=progress,
        )
    file = console.report_stream(args.json)
    print_card(result["machine"], file)
    machine = result["machine"]
    if (machine["load_average_1min"] or 0) > machine["cores"] + 1:
        console.say(
            f"warning: The machine is busy (load {machine['load_average_1min']} on {machine['cores']} cores); "
            "the figures say little"
        )
    print_result(result, file)
    if args.json:
        console.print_json(result)
    return 0


def print_card(machine: dict[str, Any], file: Any) -> None:
    """The machine that was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("load", f"{machine['load_average_1min']} (average of the last minute)"),
        ("software", f"{machine['system']}, Python {machine['python']}, {versions}"),
    ]
    console.facts("machine", rows, file)


def print_result(result: dict[str, Any], file: Any) -> None:
    """Both loops side by side."""
    rows = []
    for turn, ours_ms in result["ours_ms"].items():
        resend_ms = result["resend_ms"][turn]
        rows.append(
            (
                turn,
                f"{ours_ms:.1f}",
                f"{result['ours_min_ms'][turn]:.1f}",
                f"{resend_ms:.0f}",
                f"{result['resend_min_ms'][turn]:.0f}",
                f"{resend_ms / ours_ms:.0f}x",
                f"{result['n_ours'][turn]:.0f} and {result['n_resend'][turn]:.0f}",
            )
        )
    headings = ("turn", "ours ms", "least", "re-send ms", "least", "ratio", "turns timed")
    console.table("one silent turn, medians", headings, rows, file)
    flatness = f"flatness {result['flatness']:.2f} (ours at 120 / ours at 10)"
    print(f"{flatness}, speedup {result['speedup']:.0f} (re-send at 120 / ours at 120)", file=file, flush=True)

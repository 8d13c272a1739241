"""`streamo-edge bench`: what a turn, and each kernel, costs on this machine beside what others need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apps.cli import bench_day, bench_decoder, bench_gpu, bench_kernels, bench_quantisation, console
from apps.cli.backend import add_backend, backend_options
from apps.cli.bench_card import report
from apps.cli.bundles import add_bundle, chosen_bundle
from apps.cli.parsing import number, thread_count
from apps.demo import CHECKPOINT


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _configure_turn(what.add_parser("turn", help="one second of a stream after 10, 30 and 120 of them"))
    bench_kernels.configure(what.add_parser("kernels", help="each native kernel beside what else could do its work"))
    bench_gpu.configure(what.add_parser("gpu", help="each GPU kernel beside a copy on the same device"))
    bench_decoder.configure(what.add_parser("decoder", help="the times of a 3B or 7B, before any training"))
    bench_day.configure(what.add_parser("day", help="86,400 turns: memory, speed and quality by the hour"))
    bench_quantisation.configure(
        what.add_parser("quantisation", help="the shipped model through every precision: bytes, divergence, F1, time")
    )


def _configure_turn(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_backend(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        metavar="FOLDER",
        help="the checkpoint that the bundle was made from, for the official loop; default the shipped one",
    )
    parser.add_argument("--repeats", type=number(int, at_least=1), default=5, metavar="N", help="default 5")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="for both; default all cores")
    parser.add_argument("--seed", type=number(int, at_least=0), default=7, metavar="N", help="of the stream; default 7")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    return {
        "turn": _run_turn,
        "kernels": bench_kernels.run,
        "gpu": bench_gpu.run,
        "decoder": bench_decoder.run,
        "day": bench_day.run,
        "quantisation": bench_quantisation.run,
    }[args.what](args)


def _run_turn(args: argparse.Namespace) -> int:
    from apps.bench.turn import measure

    with console.progress() as progress:
        result = measure(
            chosen_bundle(args.bundle, progress),
            args.checkpoint,
            repeats=args.repeats,
            threads=args.threads,
            seed=args.seed,
            progress=progress,
            options=backend_options(args),
        )
    report(result, print_result, as_json=args.json)
    return 0


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

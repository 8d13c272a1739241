"""`streamo-edge bench decoder`: vision, append and decode times of a model's shape, with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apps.cli import console
from apps.cli.bench_card import report
from apps.cli.bundles import KV, WEIGHTS, extra_packages
from apps.cli.parsing import number, thread_count

SHAPES = ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "demo")
DEPTHS_TOKENS = (0, 1024, 4096, 16384)
MOST_DEPTH_TOKENS = 1 << 20
PEAK_UNITS = {
    "read_gbs": "GB/s of memory read",
    "int8_gops": "int8 GOP/s",
    "f32_gops": "float32 GFLOP/s",
    "copy_gbs": "GB/s copied",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, required=True, help="whose model; demo is the shipped one's")
    parser.add_argument("--weights", choices=WEIGHTS, default="int4", help="default int4")
    parser.add_argument("--kv", choices=KV, default="int8", help="of the KV cache; default int8")
    parser.add_argument("--block", type=int, choices=(32, 64, 128), default=32, help="rows to a scale; default 32")
    parser.add_argument(
        "--depth",
        type=_depths,
        default=list(DEPTHS_TOKENS),
        metavar="N[,N]",
        help=f"cached tokens; default {','.join(map(str, DEPTHS_TOKENS))}",
    )
    parser.add_argument(
        "--tokens", type=number(int, at_least=1), default=144, metavar="N", help="in an append; default 144"
    )
    parser.add_argument(
        "--layers", type=number(int, at_least=1, at_most=1024), metavar="N", help="of the decoder; default all"
    )
    parser.add_argument(
        "--workdir", type=Path, metavar="FOLDER", help="keep the random bundle here; default the user's cache"
    )
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="what runs it; default cpu")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default all cores")
    parser.add_argument("--repeats", type=number(int, at_least=1), default=3, metavar="N", help="default 3")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def _depths(text: str) -> list[int]:
    depth = number(int, at_least=0, at_most=MOST_DEPTH_TOKENS, unit="tokens")
    return sorted({int(depth(part)) for part in text.split(",")})


def run(args: argparse.Namespace) -> int:
    with extra_packages("demo", "Writing a random bundle"):
        from apps.bench.decoder import measure
        from apps.bench.random_bundle import Recipe

        recipe = Recipe(args.shape, args.weights, args.kv, args.block, args.layers)
        with console.progress() as progress:
            result = measure(
                recipe,
                args.depth,
                args.tokens,
                backend=args.backend,
                folder=args.workdir,
                threads=args.threads,
                repeats=args.repeats,
                progress=progress,
                say=console.say,
            )
    report(result, print_result, as_json=args.json)
    return 0


def print_result(result: dict[str, Any], file: Any) -> None:
    """What was measured, then append and decode by depth."""
    size, peaks = console.bytes_text, result["peaks"]
    where = result["placement"]["decoder"]
    rows = [
        ("bundle", f"{size(result['bundle_bytes'])} in `{result['bundle']}`"),
        ("decoder", f"{result['weights']} weights, {size(result['decoder_weights_bytes'])}; {where}"),
        ("KV cache", f"{result['kv']}, {size(result['kv_bytes_per_token'])} a token"),
        ("load", f"{result['load_s']:.1f} s"),
        ("memory peak", f"{result['rss_peak_mb']:.0f} MB"),
        ("420x224 frame", f"{result['vision_ms']:.0f} ms (least {result['vision_min_ms']:.0f})"),
    ]
    if peaks:
        rates = (f"{peaks[name]:.0f} {unit}" for name, unit in PEAK_UNITS.items() if name in peaks)
        rows.append(("peaks", ", ".join(rates)))
    console.facts(f"{result['shape']}, random weights", rows, file)
    append = f"append {result['tokens']} ms"
    headings = ("cached tokens", append, "least", "turns/s", "decode ms/token", "least", "of read peak")
    table = [
        (
            depth,
            f"{append_ms:.0f}",
            f"{result['append_min_ms'][depth]:.0f}",
            f"{result['turns_per_s'][depth]:.3g}",
            f"{result['decode_ms_per_token'][depth]:.1f}",
            f"{result['decode_min_ms_per_token'][depth]:.1f}",
            f"{result['read_fraction_of_peak'][depth]:.0%}" if depth in result["read_fraction_of_peak"] else "-",
        )
        for depth, append_ms in result["append_ms"].items()
    ]
    console.table("medians", headings, table, file)

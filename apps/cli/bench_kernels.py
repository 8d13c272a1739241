"""`streamo-edge bench kernels`: each native kernel beside the stock operator, and both beside the machine's peaks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apps.cli import console
from apps.cli.bench_card import report, writing
from apps.cli.parsing import number, some_of, thread_count

PARTS = ("peaks", "attention", "matmul", "model")
SIZES = ("3B", "7B")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=lambda text: [int(thread_count(part)) for part in text.split(",")],
        metavar="N[,N]",
        help="measure with each of these; default all cores",
    )
    some = ", ".join(PARTS)
    parser.add_argument(
        "--only", type=some_of(PARTS), default=list(PARTS), metavar="PART[,PART]", help=f"of {some}; default all"
    )
    parser.add_argument("--repeats", type=number(int, at_least=1), default=7, metavar="N", help="default 7")
    parser.add_argument(
        "--workdir", type=Path, metavar="FOLDER", help="keep the model's bundle here (2.8 GB); default a temporary one"
    )
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="of the whole model; default 3B")
    parser.add_argument(
        "--layers", type=number(int, at_least=1, at_most=1024), metavar="N", help="of the whole model; default all"
    )
    parser.add_argument("--openvino", metavar="PYTHON", help="also measure OpenVINO, installed in this Python")
    parser.add_argument("--transformers", action="store_true", help="also measure the vision tower in transformers")
    parser.add_argument(
        "--llama-bench", nargs=2, metavar=("PROGRAM", "GGUF"), help="also measure llama.cpp, with a model of this shape"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there as Markdown, too")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.bench import kernels
    from apps.bench.machine import available_cores
    from apps.bench.model import Peers

    with console.progress() as progress:
        result = kernels.measure(
            args.only,
            args.threads or [available_cores()],
            args.repeats,
            workdir=args.workdir,
            peers=Peers(args.openvino, args.transformers, args.llama_bench and tuple(args.llama_bench)),
            size=args.size,
            layers=args.layers,
            progress=progress,
        )
    report(result, print_result, as_json=args.json)
    if args.markdown:
        with writing(args.markdown):
            args.markdown.write_text(kernels.markdown(result), encoding="utf-8")
    return 0


def print_result(result: dict[str, Any], file: Any) -> None:
    """The machine's peaks, and every kernel beside the others."""
    from apps.bench import kernels

    console.table(f"peaks, {result['instruction_set']}", kernels.PEAK_HEADINGS, kernels.peak_rows(result), file)
    if result["rows"]:
        console.table("kernels, least of all rounds", kernels.HEADINGS, kernels.table_rows(result), file)

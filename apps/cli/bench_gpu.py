"""`streamo-edge bench gpu`: each GPU kernel beside what the same device needs for a copy."""

from __future__ import annotations

import argparse
from typing import Any

from apps.cli import console
from apps.cli.bench_card import report
from apps.cli.parsing import number, some_of

PARTS = ("copy", "matmul", "attention", "turn")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=number(int, at_least=0), default=0, metavar="N", help="of the GPU; default 0")
    some = ", ".join(PARTS)
    parser.add_argument(
        "--only", type=some_of(PARTS), default=list(PARTS), metavar="PART[,PART]", help=f"of {some}; default all"
    )
    parser.add_argument("--small", action="store_true", help="little sizes: to see that everything runs")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.bench import gpu

    result = gpu.measure(args.only, device=args.device, small=args.small)
    report(result, print_result, as_json=args.json)
    return 0


def print_result(result: dict[str, Any], file: Any) -> None:
    """The device, and every kernel beside a copy."""
    from apps.bench import gpu

    facts = result["gpu"]
    rows = [
        (
            "GPU",
            f"{facts['name']}, compute capability {facts['sm'] / 10:.1f}, {facts['multiprocessors']} multiprocessors",
        ),
        ("driver", f"for CUDA {facts['driver_version']}"),
        ("copy", f"{result['copy_gbps']:.0f} GB/s, read and written"),
    ]
    console.facts("GPU", rows, file)
    if result["rows"]:
        console.table("kernels, median of all rounds", gpu.HEADINGS, gpu.table_rows(result), file)

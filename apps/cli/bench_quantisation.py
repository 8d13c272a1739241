"""`streamo-edge bench quantisation`: the shipped checkpoint through every precision, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from apps.bench.quantisation_report import table_rows
from apps.cli import console
from apps.cli.bench_card import report, writing
from apps.cli.bundles import extra_packages
from apps.cli.parsing import seed_range, thread_count
from apps.demo import CHECKPOINT


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=seed_range, default=range(50000, 50050), metavar="A:B", help="for F1; default 50000:50050"
    )
    parser.add_argument("--no-streams", action="store_true", help="leave F1 and the times out")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="keep the bundles there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a picture (needs matplotlib)")
    parser.add_argument("--threads", type=thread_count, metavar="N")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.bench.quantisation import measure
    from apps.bench.quantisation_report import draw, markdown

    seeds = range(0) if args.no_streams else args.seeds
    with extra_packages("export", "Exports"), tempfile.TemporaryDirectory() as folder, console.progress() as progress:
        workdir = args.workdir or Path(folder)
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        result = measure(CHECKPOINT, workdir, seeds, threads=args.threads, progress=progress)
    report(result, print_result, as_json=args.json)
    if args.markdown:
        with writing(args.markdown):
            args.markdown.write_text(markdown(result["rows"]), encoding="utf-8")
    if args.plot:
        with extra_packages("test", "The plot"), writing(args.plot):
            draw(result["rows"], args.plot)
    return 0


def print_result(result: dict[str, Any], file: Any) -> None:
    """A row for every precision."""
    console.table("the demonstration's model by precision", *table_rows(result["rows"]), file)

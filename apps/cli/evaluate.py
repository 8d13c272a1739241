"""`streamo-edge eval`: the answers of a bundle on streams whose true answers are known."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from apps.cli import console
from apps.cli.backend import add_backend, backend_options
from apps.cli.bundles import add_bundle, add_precisions, chosen_bundle
from apps.cli.parsing import number, seed_range, thread_count

if TYPE_CHECKING:
    from apps.demo.world import Stream

METRICS = ("response_f1", "state_accuracy", "answer_accuracy")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=("demo",), help="which streams: `demo`, the demonstration's own world")
    add_bundle(parser)
    add_precisions(parser)
    add_backend(parser)
    parser.add_argument(
        "--seeds", type=seed_range, default=range(50000, 50050), metavar="A:B", help="default 50000:50050 (B excluded)"
    )
    parser.add_argument("--control", action="store_true", help="show other pictures: a model that looks must fail")
    parser.add_argument("--window", type=number(int, at_least=1, unit="turns"), metavar="N", help="window in turns")
    parser.add_argument("--threads", type=thread_count, metavar="N")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.demo.evaluate import evaluate, run_session
    from edge import StreamSession, open_bundle

    with console.progress() as progress:
        bundle = open_bundle(chosen_bundle(args.bundle, progress, weights=args.weights, kv=args.kv))
    session = StreamSession(bundle, window_turns=args.window, threads=args.threads, **backend_options(args))

    def run_stream(stream: Stream) -> list[tuple[str, str]]:
        return [(turn.state.value, turn.text) for turn in run_session(session, stream)]

    with console.progress() as progress:
        progress("streams", 0, len(args.seeds))
        done = iter(range(1, len(args.seeds) + 1))
        result = evaluate(
            run_stream,
            args.seeds,
            control=args.control,
            progress=lambda seed, figures: progress("streams", next(done), len(args.seeds)),
        )
    file = console.report_stream(args.json)
    print_result(result, file)
    if args.json:
        settings = {"suite": args.suite, "bundle": str(bundle.path), "control": args.control}
        manifest = bundle.manifest
        precisions = {"weights": manifest.decoder.weights, "kv_dtypes": list(manifest.kv_dtypes)}
        console.print_json({**result, **settings, "seeds": _seeds(args.seeds), **precisions})
    return 0


def print_result(result: dict[str, Any], file: Any) -> None:
    """The scores, over all and by task."""
    rows = [("all", *_scores(result))]
    rows += [(task.replace("_", " "), *_scores(scores)) for task, scores in result["tasks"].items()]
    headings = ("task", "streams", *(name.replace("_", " ") for name in METRICS))
    console.table("", headings, rows, file)


def _scores(scores: dict[str, Any]) -> list[str]:
    shown = []
    for name in ("n_streams", *METRICS):
        value = scores.get(name)
        with contextlib.suppress(TypeError):
            value = f"{value:.3f}" if name != "n_streams" else f"{value:d}"
        shown.append("-" if value is None else str(value))
    return shown


def _seeds(seeds: range) -> str:
    return f"{seeds.start}:{seeds.stop}"

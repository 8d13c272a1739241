"""`streamo-edge demo`: the shipped model watches a live synthetic stream and speaks by itself.

Owns the order of the show. The model is exported once into the user's cache; neither torch nor a network is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apps.cli import console
from apps.cli.backend import add_backend, backend_options, say_where
from apps.cli.bundles import add_precisions, chosen_bundle
from apps.cli.exits import INTERRUPTED
from apps.cli.parsing import number, thread_count

OUTPUTS = ("events.jsonl", "captions.vtt", "demo.mp4")
STREAM_FPS = 10


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--seconds",
        type=number(int, at_least=24, at_most=86_400, unit="seconds"),
        default=60,
        metavar="N",
        help="default 60",
    )
    add("--seed", type=number(int, at_least=0), default=11, metavar="N", help="which stream; default 11")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="where the files go; default here")
    add("--pace", choices=("realtime", "fast"), default="realtime", help="default realtime")
    add_precisions(parser)
    add_backend(parser)
    add("--threads", type=thread_count, metavar="N", help="threads of the backend")
    add("--json", action="store_true", help="end with the run's figures as one JSON document")


def run(args: argparse.Namespace) -> int:
    from apps.cli.report import print_summary, summary_json
    from apps.cli.run import open_outputs, stopper
    from apps.cli.synthetic import SyntheticSource
    from apps.demo.world import make_demo_stream
    from edge import StreamSession, open_bundle
    from edge.runtime import Question, run_stream

    outputs = output_paths(args.output_dir)
    with console.progress() as progress:
        bundle = open_bundle(chosen_bundle(None, progress, weights=args.weights, kv=args.kv))
    stream = make_demo_stream(args.seed, args.seconds)
    session = StreamSession(bundle, threads=args.threads, **backend_options(args))
    say_where(session)
    console.say(
        f"A {args.seconds} s stream that this model has never seen, with {len(stream.questions)} questions on the way. "
        "`?` marks a question; the rest is the model speaking by itself, or keeping silent.\n"
    )
    with stopper() as stop:
        summary = run_stream(
            session,
            SyntheticSource(stream, name=f"synthetic:demo?seed={args.seed}", fps=STREAM_FPS),
            questions=[Question(float(t), text) for t, text in sorted(stream.questions.items())],
            sinks=open_outputs([str(path) for path in outputs], as_json=args.json),
            pace=args.pace,
            stream_name="demo",
            stop=stop,
            on_warning=lambda text: console.say(f"warning: {text}"),
        )
    file = console.report_stream(args.json)
    print(file=file)
    print_summary(summary, file)
    print("To look at: " + ", ".join(str(path) for path in outputs), file=file, flush=True)
    if args.json:
        console.print_json({**summary_json(summary), "outputs": [str(path) for path in outputs]})
    return INTERRUPTED if summary.end_reason == "interrupted" else 0


def output_paths(folder: Path) -> list[Path]:
    """The files of the show, in a folder that is made where it is missing; events of an earlier show are removed.

    Raises:
      OutputError: it cannot be made or written.
    """
    from edge.errors import OutputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTPUTS[0]).unlink(missing_ok=True)  # this output appends, the others replace
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"Folder `{folder}` cannot be written: {reason}", hint="Give another with `--output-dir`"
        ) from None
    return [folder / name for name in OUTPUTS]

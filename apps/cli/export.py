"""`streamo-edge export`: a checkpoint folder becomes a bundle, with its parity report on the screen."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli import console
from apps.cli.bundles import KV, WEIGHTS, extra_packages
from apps.cli.inspect import print_parity, print_precision
from edge.errors import MemoryBudgetError, UsageError
from edge.memory import available_bytes, bytes_text

if TYPE_CHECKING:
    from export.preflight import Preflight
    from export.turns import Clip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Hugging Face folder of a Qwen2.5-VL architecture")
    parser.add_argument("-o", "--output", metavar="BUNDLE", required=True, help="folder to write")
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter (PEFT's or ms-swift's folder) to merge into CHECKPOINT"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32", help="default fp32")
    parser.add_argument(
        "--kv",
        choices=("auto", *KV),
        help="of the KV cache; auto chooses for each layer; default auto with int8 or int4 weights, else fp32",
    )
    _add_precisions(parser)
    parser.add_argument(
        "--gate",
        default="",
        metavar="NAME=LIMIT,...",
        help="tighter limits for held-out turns than the defaults, or a JSON file with them",
    )
    parser.add_argument(
        "--parity-layers",
        type=_layer_count,
        metavar="all|N",
        help="decoder layers that are compared with PyTorch; default all, or 8 of a model with more than 12 billion "
        "parameters",
    )
    parser.add_argument("--allow-mismatch", action="store_true", help="write the bundle even when parity fails")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE where it exists")
    parser.add_argument("--dry-run", action="store_true", help="check the checkpoint, say what it will take, and end")
    parser.add_argument("--json", action="store_true", help="print the parity report as JSON")


def _add_precisions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=("nearest", "gptq"),
        help="how weights are rounded; gptq fits them to real turns; default gptq for int4, else nearest",
    )
    parser.add_argument(
        "--block",
        type=int,
        choices=(32, 64, 128),
        default=32,
        help="weights that share a scale in int8 and int4; default 32",
    )
    parser.add_argument("--vision", choices=("fp32", "fp16", "int8"), help="of the vision tower; default as --weights")
    parser.add_argument("--embedding", choices=("fp32", "fp16", "int8"), help="of the embedding table; likewise")
    parser.add_argument(
        "--layer",
        action="append",
        type=_layer_choice,
        metavar="NAME=PRECISION",
        help="precision of one weight: layers.3.down=int8, layers.0=fp16, head=fp16; as often as you like",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="CLIP",
        help="videos of your own whose turns weights and caches are fitted to; default the demonstration's world",
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        metavar="CLIP",
        help="videos that nothing is fitted to, on which the bundle has to answer as the checkpoint does; default the "
        "last quarter of each --calibration clip, else the demonstration's world",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="asked of the clips: one a line, or `SECONDS: question`; with --calibration or --held-out",
    )


def _layer_count(text: str) -> str | int:
    if text != "all" and not (text.isdecimal() and int(text) >= 2):
        raise argparse.ArgumentTypeError(f"expected all or a number of 2 or more, found {text!r}")
    return text if text == "all" else int(text)


def _layer_choice(text: str) -> tuple[str, str]:
    name, separator, precision = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=PRECISION, found {text!r}")
    return name, precision


def _clips(args: argparse.Namespace) -> list[Clip]:
    """What to calibrate on, and what is held out: there is always some of the second."""
    from apps.cli.calibration import read_clips, read_questions
    from apps.demo.clips import demo_clips, judged_clips

    if args.questions and not (args.calibration or args.held_out):
        raise UsageError("`--questions` needs the clips that they are asked of", hint="Add `--calibration CLIP ...`")
    questions = read_questions(args.questions)
    held_out = read_clips(args.held_out or (), questions, held_out=True)
    if args.calibration:
        return read_clips(args.calibration, questions, held_out=False if held_out else None) + held_out
    if args.method == "gptq" or (args.method is None and args.weights == "int4"):
        return [clip for clip in demo_clips() if not (clip.held_out and held_out)] + held_out
    return held_out or judged_clips()


def run(args: argparse.Namespace) -> int:
    with extra_packages("export", "Export"):
        from export.api import export_checkpoint, preflight
        from export.limits import parse_gate

        chosen: dict[str, Any] = {
            "weights": args.weights,
            "block_size": args.block,
            "vision": args.vision,
            "embedding": args.embedding,
            "layers": dict(args.layer or ()),
        }
        needs = preflight(args.checkpoint, args.output, adapter=args.adapter, **chosen)  # before any clip is read
        if clips := _clips(args):
            fitted: dict[str, Any] = {"method": args.method, "clips": clips}
            needs = preflight(args.checkpoint, args.output, adapter=args.adapter, **chosen, **fitted)
        _say_needs(needs)
        if args.dry_run:
            return _dry_run(args, needs)
        _require_memory(needs)
        with _telling_of_leftovers(args.output), console.progress() as progress:
            manifest = export_checkpoint(
                args.checkpoint,
                args.output,
                kv=args.kv,
                method=args.method,
                clips=clips,
                gate=parse_gate(args.gate) if args.gate else None,
                allow_mismatch=args.allow_mismatch,
                progress=progress,
                overwrite=args.force,
                adapter=args.adapter,
                parity_layers=args.parity_layers,
                **chosen,
            )
    file = console.report_stream(args.json)
    print_precision(manifest, file)
    print_parity(manifest.parity, file)
    total_bytes = sum(facts.bytes for facts in manifest.files.values())
    kv = "/".join(sorted(set(manifest.kv_dtypes)))
    size = console.bytes_text(total_bytes)
    print(f"Wrote `{args.output}`: {size}, weights {args.weights}, KV cache {kv}", file=file, flush=True)
    if args.json:
        written = {"bundle": args.output, "weights": args.weights, "kv_dtypes": list(manifest.kv_dtypes)}
        written |= {"precision": dataclasses.asdict(manifest.precision)}
        written |= {"kv_layers": [dataclasses.asdict(layer) for layer in manifest.kv_layers]}
        console.print_json({**written, "bytes": total_bytes, "parity": manifest.parity})
    return 0


def _say_needs(needs: Preflight) -> None:
    free = available_bytes()
    memory = f" ({bytes_text(free)} free)" if free is not None else ""
    left = f" and {bytes_text(needs.left_behind_bytes)} left by an earlier export" if needs.left_behind_bytes else ""
    disk = bytes_text(needs.bundle_bytes + needs.kept_bytes)
    console.say(
        f"Needs about {disk} of disk ({bytes_text(needs.disk_free_bytes)} free{left}) "
        f"and {bytes_text(needs.memory_bytes)} of memory{memory}"
    )


def _dry_run(args: argparse.Namespace, needs: Preflight) -> int:
    """What would be done, without doing it."""
    rows = [
        ("checkpoint", f"{needs.parameters / 1e9:.2f} billion parameters, {needs.layers} layers"),
        ("bundle", f"about {bytes_text(needs.bundle_bytes)}, weights {args.weights}"),
        *_calibration_rows(needs),
        ("known hashes", f"{needs.known_hashes} files will be compared" if needs.known_hashes else "none"),
        *(("note", note) for note in needs.notes),
    ]
    console.facts(f"`{args.output}` would be written", rows, console.report_stream(args.json))
    if args.json:
        console.print_json({**dataclasses.asdict(needs), "memory_free_bytes": available_bytes()})
    return 0


def _calibration_rows(needs: Preflight) -> list[tuple[str, str]]:
    if not needs.calibration_clips:
        return []
    turns = f"{needs.calibration_turns} turns of {needs.calibration_clips} clips"
    kept = f"{bytes_text(needs.kept_bytes)} kept on disk until the bundle is complete"
    return [("calibration", f"about {needs.calibration_tokens} tokens of {turns}; {kept}")]


def _require_memory(needs: Preflight) -> None:
    free = available_bytes()
    if free is not None and needs.memory_bytes > free:
        raise MemoryBudgetError(
            f"The export takes about {bytes_text(needs.memory_bytes)} of memory, {bytes_text(free)} are free",
            hint="End other programs, or export on a machine with more memory",
        )


@contextmanager
def _telling_of_leftovers(output: str) -> Iterator[None]:
    """Say what an interruption left there, and what becomes of it."""
    try:
        yield
    except KeyboardInterrupt:
        from export.partial import left_behind_bytes

        kept = left_behind_bytes(Path(output).absolute())
        if kept:
            console.say(f"Interrupted: {bytes_text(kept)} are kept; the same command goes on behind them")
        raise

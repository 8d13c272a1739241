"""A checkpoint of full size, exported, loaded and run, beside transformers in bfloat16 on the same machine.

Owns the comparison: both are measured against transformers in float32, one layer in memory at a time, over the probe
that every export is proved with. A bundle that is not quantised may be off by what bfloat16 itself is off; a quantised
one by what its rounded weights explain. Works with any checkpoint; the figures in the documentation are of random
weights of the 3B's shape.

    python -m apps.bench.full_size CHECKPOINT --workdir FOLDER --weights fp16,int4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench.machine import machine_card
from apps.cli import console
from edge.errors import EdgeError


def measure(checkpoint: Path, workdir: Path, weights: list[str]) -> dict[str, Any]:
    """Everything: bfloat16's own error, then each bundle's.

    Args:
      workdir: bundles are written there, and kept.

    Returns:
      `bfloat16` and one entry for each precision, with greatest relative errors of visual tokens and logits, cosine,
      divergence, and for bundles the seconds and bytes of export and loading.
    """
    from export.expected import compute_expected
    from export.source import open_source

    source = open_source(checkpoint)
    console.say("transformers, float32 ...")
    expected = compute_expected(source.checkpoint, source.probe)
    console.say("transformers, bfloat16 ...")
    half = compute_expected(source.checkpoint, source.probe, dtype="bfloat16")
    result: dict[str, Any] = {
        "parameters": source.checkpoint.parameters,
        "tokens": len(source.probe.ids),
        "reference": expected.reference,
        "bfloat16": _errors(half.frames, half.logits, expected),
    }
    for precision in weights:
        console.say(f"bundle, {precision} ...")
        result[precision] = _bundle(checkpoint, workdir / precision, precision)
    return {**result, "machine": machine_card(1)}


def _errors(frames: list[np.ndarray], logits: np.ndarray, expected: Any) -> dict[str, float]:
    from export.held_out import cosines, divergences
    from export.parity import greatest_error

    figures = {
        "vision_relative_error": greatest_error(frames, expected.frames),
        "logits_relative_error": greatest_error(logits, expected.logits),
        "logit_cosine_min": float(cosines(logits, expected.logits).min()),
        "kl_mean": float(divergences(logits, expected.logits).mean()),
        "top1_agreement": float((logits.argmax(1) == expected.logits.argmax(1)).mean()),
    }
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def _bundle(checkpoint: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Export, then open and run one frame and one append where the loaded weights fit in memory."""
    from export.api import export_checkpoint

    start_s = time.perf_counter()
    manifest = export_checkpoint(checkpoint, folder, weights=precision, overwrite=True, allow_mismatch=True)
    export_s = time.perf_counter() - start_s
    kept = {name: value for name, value in manifest.parity.items() if name != "reference"}
    total = sum(facts.bytes for facts in manifest.files.values())
    found = {**kept, "bytes": total, "export_s": round(export_s, 1)}
    return found if precision in ("fp32", "fp16") else {**found, **_loaded(folder)}


def _loaded(folder: Path) -> dict[str, Any]:
    """The bundle in the runtime: one turn."""
    import edge

    start_s = time.perf_counter()
    session = edge.StreamSession(edge.open_bundle(folder), window_turns=2, max_reply_tokens=4)
    load_s = time.perf_counter() - start_s
    session.ask("What is happening?")
    turn = session.push(np.random.default_rng(0).integers(0, 256, (224, 420, 3), np.uint8), 0)
    finite = turn.logits is not None and bool(np.isfinite(turn.logits).all())
    return {"load_s": round(load_s, 1), "turn_ms": round(turn.timing_ms["turn"], 1), "turn_logits_finite": finite}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--weights", default="fp16,int4", metavar="PRECISION[,PRECISION]")
    args = parser.parse_args()
    try:
        console.print_json(measure(args.checkpoint, args.workdir, args.weights.split(",")))
    except EdgeError as error:
        console.show_error(error.message, error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`streamo-edge inspect`: what a bundle is, what a stream with it will cost in memory, and how exact it is.

Owns the presentation of a manifest. Loads no graph.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from apps.cli import console

if TYPE_CHECKING:
    from edge.bundle import Bundle
    from edge.contract import Manifest

WORST = 3


NOT_FIGURES = ("thresholds", "passed", "reference", "native", "instruction_set", "problems", "held_out", "clips",
               "replies", "graphs", "diagnosis", "compared_layers", "layers")  # fmt: skip
"""What a parity report holds beside its figures."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `streamo-edge export` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from edge import open_bundle

    bundle = open_bundle(args.bundle)
    document = describe(bundle)
    if args.json:
        console.print_json(document)
    else:
        _print(document)
        print_precision(bundle.manifest, sys.stdout)
        print_parity(bundle.manifest.parity, sys.stdout)
    return 0


def describe(bundle: Bundle) -> dict[str, Any]:
    """Facts and budget of a bundle as JSON values."""
    import dataclasses

    from apps.cli.budget import plan_here
    from edge.memory import available_bytes

    manifest = bundle.manifest
    plan, policy = plan_here(bundle)
    weights_bytes = manifest.vision.weights_bytes + manifest.decoder.weights_bytes
    free_bytes = available_bytes()
    return {
        "bundle": str(bundle.path),
        "schema": manifest.schema,
        "tool": manifest.tool,
        "source": manifest.source,
        "decoder": dataclasses.asdict(manifest.decoder_facts),
        "vision": dataclasses.asdict(manifest.vision_facts),
        "weights": {"vision": manifest.vision.weights, "decoder": manifest.decoder.weights},
        "embedding": dataclasses.asdict(manifest.embedding),
        "precision": dataclasses.asdict(manifest.precision),
        "kv_layers": [dataclasses.asdict(layer) for layer in manifest.kv_layers],
        "weights_bytes": {"vision": manifest.vision.weights_bytes, "decoder": manifest.decoder.weights_bytes},
        "files": {name: facts.bytes for name, facts in manifest.files.items()},
        "total_bytes": sum(facts.bytes for facts in manifest.files.values()),
        "max_visual_tokens": manifest.max_visual_tokens,
        "tokens": {
            "system": plan.system_tokens,
            "turn_text": plan.turn_text_tokens,
            "largest_turn": plan.turn_tokens,
            "questions": plan.question_tokens,
            "replies": plan.reply_tokens,
        },
        "policy": policy,
        "window_turns": manifest.stream.window_turns,
        "window_s": plan.window_s,
        "window_tokens": plan.capacity_tokens,
        "kv_dtypes": list(plan.kv_dtypes),
        "kv_bytes_per_token": plan.bytes_per_token,
        "kv_window_bytes": plan.kv_bytes,
        "window_bytes": plan.total_bytes,
        "turn_bytes": plan.turn_bytes,
        "free_bytes": free_bytes,
        "turns_that_fit": None if free_bytes is None else plan.turns_that_fit(free_bytes - weights_bytes),
        "parity": manifest.parity,
    }


def _print(document: dict[str, Any]) -> None:
    size = console.bytes_text
    decoder, vision, tokens = document["decoder"], document["vision"], document["tokens"]
    rows = [
        (
            "decoder",
            f"{decoder['layers']} layers x {decoder['hidden_size']}, {decoder['num_heads']} query and "
            f"{decoder['num_kv_heads']} key/value heads x {decoder['head_dim']}, vocabulary {decoder['vocab_size']}",
        ),
        (
            "vision",
            f"{vision['depth']} blocks x {vision['hidden_size']}, {vision['num_heads']} heads, "
            f"full attention in {list(vision['full_attention_blocks'])}",
        ),
        *((f"{name} weights", f"{kind}, {size(document['weights_bytes'][name])}")
          for name, kind in document["weights"].items()),
        ("largest turn", f"{tokens['largest_turn']} tokens: {document['max_visual_tokens']} visual, "
                         f"{tokens['turn_text']} text"),
        ("window", f"{document['window_turns']} turns = {document['window_s']} s; room for "
                   f"{document['window_tokens']} tokens, of them {tokens['questions']} for questions "
                   f"and {tokens['replies']} for replies"),
        ("KV cache", f"{size(document['kv_bytes_per_token'])} a token ({_kinds(document['kv_dtypes'])}), "
                     f"{size(document['kv_window_bytes'])} for the window; policy {document['policy']}"),
        ("memory", _memory_text(document)),
    ]  # fmt: skip
    console.facts(f"{document['bundle']} ({document['schema']}, made by {document['tool']})", rows, sys.stdout)
    console.facts("source", [(key, value) for key, value in document["source"].items()], sys.stdout)
    files = [(name, size(count)) for name, count in document["files"].items()]
    console.facts("files", [*files, ("total", size(document["total_bytes"]))], sys.stdout)


def _memory_text(document: dict[str, Any]) -> str:
    size = console.bytes_text
    text = f"{size(document['turn_bytes'])} for each turn of the window"
    if document["free_bytes"] is None:
        return text
    return f"{text}; {size(document['free_bytes'])} is free here: at most {document['turns_that_fit']} turns"


def print_precision(manifest: Manifest, file: Any) -> None:
    """How the decoder's weights were rounded, which differ and why, and what was chosen for each layer's cache."""
    precision, table = manifest.precision, manifest.embedding
    rows = [("embedding table", table.dtype), ("head", precision.head)]
    if precision.method:
        rows.insert(0, ("rounding", f"{precision.method}, blocks of {precision.block_size}"))
    if precision.calibration:
        found = precision.calibration
        turns = f"{found['turns']} turns of {len(found['clips'])} clips"
        rows.append(("calibrated on", f"{turns}, {found['tokens']} tokens"))
    if precision.output_errors:
        worst = sorted(precision.output_errors.items(), key=lambda item: -item[1])[:WORST]
        rows.append(("largest errors", ", ".join(f"{name} {error:.2g}" for name, error in worst)))
    console.facts("precision", rows, file)
    if precision.overrides:
        chosen = [(one.name, one.weights, one.reason) for one in precision.overrides]
        console.table("weights that differ", ("weight", "precision", "reason"), chosen, file)
    if manifest.kv_layers:
        kinds = list(dict.fromkeys(kind for layer in manifest.kv_layers for kind in layer.errors))
        layers = [
            (
                str(i),
                layer.dtype,
                layer.offset,
                _short(layer.largest_pair),
                *(_short(layer.errors[kind]) if kind in layer.errors else "-" for kind in kinds),
                layer.reason,
            )
            for i, layer in enumerate(manifest.kv_layers)
        ]
        headings = ("layer", "cache", "offset", "common/own", *(f"error {kind}" for kind in kinds), "reason")
        console.table("KV cache by layer", headings, layers, file)


def print_parity(parity: dict[str, Any], file: Any) -> None:
    """The parity report as a table, whatever quantities it holds, each with its limit where it has one."""
    if not parity:
        print("parity with PyTorch: not measured\n", file=file)
        return
    compared = parity.get("compared_layers")
    what = ""
    if compared:
        what = f"layers {', '.join(map(str, compared))} of {parity['layers']}, teacher-forced; "
        what += f"held-out clips: {len(parity['clips'])}; "
    title = f"parity with PyTorch: {_verdict(parity)} ({what}reference: {parity.get('reference', 'not named')})"
    console.table(title, ("quantity", "measured", "allowed"), _parity_rows(parity), file)
    native, held_out = parity.get("native"), parity.get("held_out")
    if native:
        title = f"the same of the native graphs: {_verdict(native)} ({native.get('instruction_set')})"
        console.table(title, ("quantity", "measured", "allowed"), _parity_rows(native), file)
    if held_out:
        _print_held_out(held_out, parity.get("reference"), file)
    for problem in parity.get("problems", []):
        print(f"problem: {problem}", file=file)


def _print_held_out(held_out: dict[str, Any], known: str | None, file: Any) -> None:
    """What a user would feel, on turns that nothing was tuned on. `known`: a reference that need not be named again."""
    clips = held_out["clips"]
    where = f"{held_out['compared_turns']} turns of {len(clips)} clips" if "compared_turns" in held_out else "no turns"
    if "own" not in held_out.get("replies", "own"):
        where += ", of which the model was asked the states only"
    title = f"held-out turns: {_verdict(held_out)} ({where}; {held_out['graphs']} graphs, teacher-forced"
    if held_out.get("reference", known) != known:
        title += f"; reference: {held_out['reference']}"
    title += ")"
    console.table(title, ("quantity", "measured", "allowed"), _parity_rows(held_out), file)
    if diagnosis := held_out.get("diagnosis"):
        from export.diagnosis_text import diagnosis_text

        print(diagnosis_text(diagnosis), file=file)


def _verdict(parity: dict[str, Any]) -> str:
    return "passed" if parity.get("passed") else "FAILED"


def _parity_rows(parity: dict[str, Any]) -> list[tuple[str, str, str]]:
    limits = parity.get("thresholds", {})
    rows = []
    for name, value in parity.items():
        if name in NOT_FIGURES or (name == "state_flips" and not value):
            continue
        sign = "at least" if name.endswith("_min") or name == "top1_agreement" else "at most"
        rows.append((name.replace("_", " "), _short(value), f"{sign} {_short(limits[name])}" if name in limits else ""))
    return rows


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items())
    if not isinstance(value, float):
        return str(value)
    return f"{value:.7g}" if 0.9 < value < 1 else f"{value:.3g}"


def _kinds(dtypes: list[str]) -> str:
    return ", ".join(dict.fromkeys(dtypes))

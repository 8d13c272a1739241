"""Does a bundle compute what the checkpoint computes in PyTorch? The figures, the thresholds, the verdict.

Owns the comparison. Runs neither a graph nor a torch module itself (see `graph_check` and `reference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.errors import ParityError
from export.diagnosis_text import diagnosis_text
from export.expected import Expected
from export.graph_check import GraphCheck
from export.held_out import cosines, divergences
from export.limits import AT_LEAST, INT8_KV_KL_MEAN, keeps, within
from export.probe import Probe

THRESHOLDS: dict[str, dict[str, float]] = {
    "fp32": {"vision_relative_error": 1e-4, "logits_relative_error": 1e-4, "logit_cosine_min": 0.999999},
    "fp16": {"vision_relative_error": 1e-2, "logits_relative_error": 2e-2, "logit_cosine_min": 0.9999},
    "int8": {"vision_relative_error": 0.25, "logit_cosine_min": 0.99},
    "int4": {"vision_relative_error": 0.25, "logit_cosine_min": 0.75},
}
"""Greatest errors and smallest cosine against the checkpoint; what rounding of its weights explains, several times
over. In 8 and 4 bits that is much, so they prove little about the graph; `ROUNDED_RELATIVE_ERROR` does.
"""
ROUNDED_RELATIVE_ERROR = 1e-4
"""Greatest error against PyTorch with the same rounded weights, both in float32: only the order of sums differs."""
INT8_KV_LOGIT_COSINE = 0.999
"""Smallest cosine with an int8 KV cache, whatever the weights."""
SHOWN_PROBLEMS = 3
MOST_NAMED_LAYERS = 8
"""In a hint; where more need more bits, it is simpler to give all of them."""


@dataclass(frozen=True)
class Computed:
    """What graphs made of the probe: each frame's embeddings (N, W), and the logits (n, V) after each part."""

    frames: list[np.ndarray]
    logits: np.ndarray


def run_probe(probe: Probe, graphs: GraphCheck) -> Computed:
    """Run the graphs over the probe."""
    frames = graphs.vision(probe.frames)
    return Computed(frames, graphs.decoder(probe.appends(graphs.embeddings(probe.ids), frames)))


def compare(found: Computed, expected: Expected, weights: str, rounded_error: float | None = None) -> dict[str, Any]:
    """The manifest's `parity`, whether it passes or not.

    Args:
      rounded_error: for int8 and int4, where PyTorch is at hand; see `rounded_relative_error`.
    """
    vision_error = greatest_error(found.frames, expected.frames)
    figures = verdict(vision_error, found.logits, expected.logits, THRESHOLDS[weights], rounded_error)
    return {"reference": expected.reference, "turns": len(found.frames), "appends": len(found.logits), **figures}


def compare_native(
    found: Computed, stock: Computed, expected: Expected, weights: str, kv_dtypes: tuple[str, ...]
) -> dict[str, Any]:
    """The same of the native graphs, which always quantise the inputs of products with quantised weights.

    Args:
      stock: what the stock graphs made of the same weights. An int8 cache is judged by the distance from them: in 4
        bits, the distance from the checkpoint would hide what a cache loses.
    """
    limits = dict(THRESHOLDS[weights])
    figures = {}
    if "int8" in kv_dtypes:
        limits.pop("logits_relative_error", None)
        limits["logit_cosine_min"] = min(limits["logit_cosine_min"], INT8_KV_LOGIT_COSINE)
        limits["int8_kv_kl_mean"] = INT8_KV_KL_MEAN
        figures["int8_kv_kl_mean"] = float(divergences(found.logits, stock.logits).mean())
    return verdict(greatest_error(found.frames, expected.frames), found.logits, expected.logits, limits, None, figures)


def rounded_relative_error(found: Computed, expected: Expected) -> float:
    """Greatest error of graphs with products in float32 against PyTorch with the weights that the bundle stores."""
    return greatest_error([*found.frames, *found.logits], [*expected.frames, *expected.logits])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest difference, as a part of the greatest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def greatest_error(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> float:
    """The greatest `relative_error` of all pairs; not a number if one is none."""
    return float(np.max([relative_error(one, wanted) for one, wanted in zip(found, expected, strict=True)]))


def verdict(
    vision_error: float,
    found: np.ndarray,
    expected: np.ndarray,
    thresholds: dict[str, float],
    rounded_error: float | None = None,
    more: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of logits (n, V), and whether they are within the thresholds."""
    divergence = divergences(found, expected)
    figures = {
        "vision_relative_error": vision_error,
        "logits_relative_error": greatest_error(found, expected),
        "logit_cosine_min": float(cosines(found, expected).min()),
        "top1_agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        **(more or {}),
    }
    limits = dict(thresholds)
    if rounded_error is not None:
        figures["rounded_relative_error"] = rounded_error
        limits["rounded_relative_error"] = ROUNDED_RELATIVE_ERROR
    passed = all(within(name, figures[name], limit) for name, limit in limits.items())
    shown = {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in figures.items()}
    shown["logit_cosine_min"] = round(figures["logit_cosine_min"], 7) if shown["logit_cosine_min"] else None
    return {**shown, "thresholds": limits, "passed": passed}


def require_parity(parity: dict[str, Any]) -> None:
    """Refuse a report that did not pass.

    Raises:
      ParityError: with what is wrong with the files, or each figure beyond its threshold.
    """
    if problems := parity.get("problems"):
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise ParityError(
            f"The bundle is not the checkpoint's model: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}",
            hint="This is a fault of the export, not of its precision: please report it; "
            "`--allow-mismatch` writes the bundle to look at it",
        )
    named = (("exported graphs", parity), ("exported native graphs", parity.get("native")),
             ("bundle's answers on held-out turns", parity.get("held_out")))  # fmt: skip
    for which, report in named:
        if report is None or report["passed"]:
            continue
        beyond = [
            f"{name} {report[name]}, {'at least' if name in AT_LEAST else 'at most'} {limit:g} expected"
            for name, limit in report["thresholds"].items()
            if name in report and not keeps(report, name, limit)
        ]
        reference = report.get("reference", parity["reference"])
        found = diagnosis_text(report["diagnosis"]) if "diagnosis" in report else ""
        if "layer_errors" in report:
            worst = list(report["layer_errors"].items())[:SHOWN_PROBLEMS]
            found = f"Layers that differ most: {', '.join(f'{layer} ({error:.2g})' for layer, error in worst)}"
        raise ParityError(
            f"The {which} differ from {reference}: {'; '.join(beyond)}{found and '. ' + found}",
            hint=_hint(report),
        )


def _hint(report: dict[str, Any]) -> str:
    allow = "add `--allow-mismatch` to look at the bundle"
    diagnosis = report.get("diagnosis")
    if diagnosis and diagnosis["weights_alone_pass"]:
        return f"Try `--kv fp32`, or {allow}"
    cheapest = diagnosis["cheapest"] if diagnosis else None
    if cheapest and len(cheapest["layers"]) <= MOST_NAMED_LAYERS:
        options = " ".join(f"--layer layers.{layer}={cheapest['weights']}" for layer in cheapest["layers"])
        return f"Add `{options}`, or {allow}"
    return f"Try `--weights int8` or fp16, or {allow}"

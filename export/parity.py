"""Does a bundle compute what the checkpoint computes in PyTorch? The figures, the thresholds, the verdict.

Owns the comparison. Runs neither a graph nor a torch module itself (see `graph_check` and `reference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.errors import ParityError
from export.expected import Expected
from export.graph_check import GraphCheck
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
AT_LEAST = ("logit_cosine_min",)


@dataclass(frozen=True)
class RoundedCheck:
    """The graphs with products in float32, and what PyTorch computes with the weights that the bundle stores."""

    graphs: GraphCheck
    expected: Expected


def compare(
    probe: Probe, graphs: GraphCheck, expected: Expected, weights: str, rounded: RoundedCheck | None = None
) -> dict[str, Any]:
    """Run the exported graphs over the probe. Returns the manifest's `parity`, whether it passes or not.

    Args:
      rounded: for int8 and int4, where PyTorch is at hand.
    """
    frames, logits = _run(probe, graphs)
    rounded_error = None if rounded is None else _rounded_error(probe, rounded)
    vision_error = greatest_error(frames, expected.frames)
    verdict = _verdict(vision_error, logits, expected.logits, THRESHOLDS[weights], rounded_error)
    return {"reference": expected.reference, "turns": len(frames), "appends": len(logits), **verdict}


def compare_native(
    probe: Probe, graphs: GraphCheck, expected: Expected, weights: str, kv_dtypes: tuple[str, ...]
) -> dict[str, Any]:
    """The same for the native graphs, which always quantise the inputs of products with quantised weights."""
    frames, logits = _run(probe, graphs)
    limits = dict(THRESHOLDS[weights])
    if "int8" in kv_dtypes:
        limits.pop("logits_relative_error", None)
        limits["logit_cosine_min"] = min(limits["logit_cosine_min"], INT8_KV_LOGIT_COSINE)
    return _verdict(greatest_error(frames, expected.frames), logits, expected.logits, limits)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest difference, as a part of the greatest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def greatest_error(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> float:
    """The greatest `relative_error` of all pairs; not a number if one is none."""
    return float(np.max([relative_error(one, wanted) for one, wanted in zip(found, expected, strict=True)]))


def _run(probe: Probe, graphs: GraphCheck) -> tuple[list[np.ndarray], np.ndarray]:
    """Each frame's embeddings (N, W), and the logits (n, V) after each part."""
    frames = graphs.vision(probe.frames)
    return frames, graphs.decoder(probe.appends(graphs.embeddings(probe.ids), frames))


def _rounded_error(probe: Probe, rounded: RoundedCheck) -> float:
    """Greatest relative error of any frame's embeddings and of the logits after any part."""
    frames, logits = _run(probe, rounded.graphs)
    return greatest_error([*frames, *logits], [*rounded.expected.frames, *rounded.expected.logits])


def _verdict(
    vision_error: float,
    found: np.ndarray,
    expected: np.ndarray,
    thresholds: dict[str, float],
    rounded_error: float | None = None,
) -> dict[str, Any]:
    """The figures of logits (n, V), and whether they are within the thresholds."""
    cosines = (found * expected).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1))
    log_found, log_expected = _log_softmax(found), _log_softmax(expected)
    divergence = (np.exp(log_expected) * (log_expected - log_found)).sum(1)
    figures = {
        "vision_relative_error": vision_error,
        "logits_relative_error": greatest_error(found, expected),
        "logit_cosine_min": float(cosines.min()),
        "top1_agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
        "kl_max": float(divergence.max()),
    }
    limits = dict(thresholds)
    if rounded_error is not None:
        figures["rounded_relative_error"] = rounded_error
        limits["rounded_relative_error"] = ROUNDED_RELATIVE_ERROR
    passed = all(_within(name, figures[name], limit) for name, limit in limits.items())
    shown = {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in figures.items()}
    shown["logit_cosine_min"] = round(figures["logit_cosine_min"], 7) if shown["logit_cosine_min"] else None
    return {**shown, "thresholds": limits, "passed": passed}


def require_parity(parity: dict[str, Any]) -> None:
    """Refuse a report that did not pass.

    Raises:
      ParityError: with each figure beyond its threshold.
    """
    for which, report in (("", parity), ("native ", parity.get("native", {"passed": True}))):
        if report["passed"]:
            continue
        beyond = [
            f"{name} {report[name]}, {'at least' if name in AT_LEAST else 'at most'} {limit} expected"
            for name, limit in report["thresholds"].items()
            if report[name] is None or not _within(name, report[name], limit)
        ]
        raise ParityError(
            f"The exported {which}graphs differ from {parity['reference']}: {'; '.join(beyond)}",
            hint="Try `--weights int8` or fp16, or add `--allow-mismatch` to look at the bundle",
        )


def _within(name: str, value: float, limit: float) -> bool:
    return value >= limit if name in AT_LEAST else value <= limit  # False for what is not a number


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

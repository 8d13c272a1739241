"""Does a bundle compute what the checkpoint computes in PyTorch? The figures, the thresholds, the verdict.

Owns the comparison. Runs neither a graph nor a torch module itself (see `graph_check` and `reference`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edge.errors import ParityError
from export.expected import Expected
from export.graph_check import GraphCheck
from export.probe import Probe

THRESHOLDS: dict[str, dict[str, float]] = {
    "fp32": {"vision_relative_error": 1e-4, "logits_relative_error": 1e-4, "logit_cosine_min": 0.999999},
    "fp16": {"vision_relative_error": 1e-2, "logits_relative_error": 2e-2, "logit_cosine_min": 0.9999},
    "int8": {"vision_relative_error": 1e-2, "logit_cosine_min": 0.99},
    "int4": {"vision_relative_error": 1e-2, "logit_cosine_min": 0.75},
}
"""Greatest errors and smallest cosine; what rounding of the weights explains, several times over."""
AT_LEAST = ("logit_cosine_min",)


def compare(probe: Probe, graphs: GraphCheck, expected: Expected, weights: str) -> dict[str, Any]:
    """Run the exported graphs over the probe. Returns the manifest's `parity`, whether it passes or not."""
    frames = graphs.vision(probe.frames)
    logits = graphs.decoder(probe.appends(graphs.embeddings(probe.ids), frames))
    errors = [relative_error(found, wanted) for found, wanted in zip(frames, expected.frames, strict=True)]
    verdict = _verdict(max(errors), logits, expected.logits, weights)
    return {"reference": expected.reference, "turns": len(frames), "appends": len(logits), **verdict}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest difference, as a part of the greatest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _verdict(vision_error: float, found: np.ndarray, expected: np.ndarray, weights: str) -> dict[str, Any]:
    """The figures of logits (n, V), and whether they are within the precision's thresholds."""
    cosines = (found * expected).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1))
    log_found, log_expected = _log_softmax(found), _log_softmax(expected)
    divergence = (np.exp(log_expected) * (log_expected - log_found)).sum(1)
    figures = {
        "vision_relative_error": vision_error,
        "logits_relative_error": max(relative_error(a, b) for a, b in zip(found, expected, strict=True)),
        "logit_cosine_min": float(cosines.min()),
        "top1_agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
        "kl_max": float(divergence.max()),
    }
    limits = THRESHOLDS[weights]
    passed = all(_within(name, figures[name], limit) for name, limit in limits.items())
    shown = {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in figures.items()}
    shown["logit_cosine_min"] = round(figures["logit_cosine_min"], 7) if shown["logit_cosine_min"] else None
    return {**shown, "thresholds": dict(limits), "passed": passed}


def require_parity(parity: dict[str, Any]) -> None:
    """Refuse a report that did not pass.

    Raises:
      ParityError: with each figure beyond its threshold.
    """
    if parity["passed"]:
        return
    limits = parity["thresholds"]
    beyond = [
        f"{name} {parity[name]}, {'at least' if name in AT_LEAST else 'at most'} {limit} expected"
        for name, limit in limits.items()
        if parity[name] is None or not _within(name, parity[name], limit)
    ]
    raise ParityError(
        f"The exported graphs differ from {parity['reference']}: {'; '.join(beyond)}",
        hint="Try `--weights int8` or fp16, or add `--allow-mismatch` to look at the bundle",
    )


def _within(name: str, value: float, limit: float) -> bool:
    return value >= limit if name in AT_LEAST else value <= limit  # False for what is not a number


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

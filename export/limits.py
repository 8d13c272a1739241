"""How far a bundle may be from the original on held-out turns, and how a user asks for less.

Owns the defaults and the reading of `--gate`. Measures nothing (see `held_out`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge.errors import UsageError

AT_LEAST = ("logit_cosine_min", "top1_agreement")
"""Figures that must not be smaller; all others must not be larger."""
FIGURES = (
    "kl_mean",
    "kl_max",
    "logit_cosine_min",
    "top1_agreement",
    "state_flip_rate",
    "response_shift_s",
    "changed_word_rate",
)
DEFAULTS: dict[str, dict[str, float]] = {
    "fp32": {"kl_mean": 1e-6, "state_flip_rate": 0.005, "response_shift_s": 0.05, "changed_word_rate": 0.005},
    "fp16": {"kl_mean": 1e-4, "state_flip_rate": 0.01, "response_shift_s": 0.1, "changed_word_rate": 0.01},
    "int8": {"kl_mean": 0.01, "state_flip_rate": 0.03, "response_shift_s": 0.25, "changed_word_rate": 0.03},
    "int4": {"kl_mean": 0.1, "state_flip_rate": 0.05, "response_shift_s": 0.5, "changed_word_rate": 0.1},
}
"""By the precision of the decoder's weights."""
INT8_KV_KL_MEAN = 1e-3
"""What an int8 cache may add."""
ONE_OF = 1.0001
"""One decision, with room for a figure's rounding to four digits."""


def held_out_limits(
    weights: str,
    kv_dtypes: tuple[str, ...] | None,
    tightened: Mapping[str, float],
    counts: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """The limits of one export.

    Args:
      tightened: the user's own.
      counts: decisions that a rate is a part of. Among a few, one that differs says nothing about the rate among many:
        a default never forbids it. The user's own limits do.

    Raises:
      UsageError: one of them is looser than the default.
    """
    limits = dict(DEFAULTS[weights])
    if kv_dtypes is not None and "int8" in kv_dtypes:
        limits["kl_mean"] += INT8_KV_KL_MEAN
        for name in ("state_flip_rate", "response_shift_s", "changed_word_rate"):
            limits[name] = max(limits[name], DEFAULTS["fp16"][name])
    for name, count in (counts or {}).items():
        if count:
            limits[name] = max(limits[name], ONE_OF / count)
    for name, limit in tightened.items():
        default = limits.get(name)
        if default is not None and (limit < default if name in AT_LEAST else limit > default):
            raise UsageError(
                f"The gate's {name} can only be tightened: at {'least' if name in AT_LEAST else 'most'} {default:g} "
                f"with {weights} weights, found {limit:g}",
                hint="`--allow-mismatch` writes a bundle whatever its figures are",
            )
        limits[name] = limit
    return limits


def within(name: str, value: float, limit: float) -> bool:
    """Whether a figure keeps its limit; what is not a number does not."""
    return value >= limit if name in AT_LEAST else value <= limit


def keeps(figures: Mapping[str, Any], name: str, limit: float) -> bool:
    """Whether a figure keeps its limit. One that nothing was counted for does, unless no logit was a number."""
    value = figures.get(name)
    if value is None:
        return figures.get("kl_mean") is not None
    return within(name, value, limit)


def parse_gate(text: str) -> dict[str, float]:
    """`kl_mean=0.01,state_flip_rate=0` or the name of a JSON file with such names and numbers.

    Raises:
      UsageError: neither, an unknown figure, or a limit that is no number of 0 or more.
    """
    given = _from_file(Path(text)) if text.endswith(".json") else _from_text(text)
    limits = {}
    for name, value in given.items():
        if name not in FIGURES:
            raise UsageError(f"The gate has no figure `{name}`; it has {', '.join(FIGURES)}")
        try:
            limits[name] = limit = float(value)
        except (TypeError, ValueError):
            limit = math.nan
        if not (math.isfinite(limit) and limit >= 0) or isinstance(value, bool):
            raise UsageError(f"The gate's {name}: expected a number of 0 or more, found {value!r}")
    return limits


def _from_text(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise UsageError(
            f"The gate should be written as NAME=LIMIT,..., found {wrong[0]!r}", hint="Example: `--gate kl_mean=0.01`"
        )
    return {name.strip(): value for name, _, value in pairs}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The gate's file `{path}` cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The gate's file `{path}` is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"The gate's file `{path}` should hold an object of limits, found {type(document).__name__}")
    return document

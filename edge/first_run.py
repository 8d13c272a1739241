"""Whether a bundle computes here what it computed when it was exported: a few stored turns, run once.

Owns the comparison, its limits and the words of a refusal. What is stored is `stored_turns`'s, and that a check has
passed is remembered by `passed_checks`. Knows no backend by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge import passed_checks
from edge.backends.base import Backend
from edge.bundle import Bundle
from edge.contract import Manifest
from edge.decoder import Decoder, Segment
from edge.errors import ParityError
from edge.stored_turns import StoredTurns, normalisers_of, read_stored_turns, sketch
from edge.vision import VisionEncoder

LIMITS: dict[str, dict[str, float]] = {
    "fp32": {"kl_mean": 0.01, "logits_relative_error": 0.02, "vision_relative_error": 0.02},
    "fp16": {"kl_mean": 0.01, "logits_relative_error": 0.02, "vision_relative_error": 0.02},
    "int8": {"kl_mean": 0.05, "logits_relative_error": 0.15, "vision_relative_error": 0.15},
    "int4": {"kl_mean": 0.1, "logits_relative_error": 0.25, "vision_relative_error": 0.15},
}
"""By the decoder's weights: several times what other kernels of the same weights differ by, far from garbage."""
LAYER_LIMIT = {"fp32": 0.02, "fp16": 0.02, "int8": 0.15, "int4": 0.25}
"""Of a layer's cached rows; names the layer, decides nothing."""


@dataclass(frozen=True)
class Comparison:
    """How far a run of the stored turns is from what is stored.

    Attributes:
      figures: by name; not a number where a logit was none.
      limits: the greatest allowed.
      layers: relative error of each layer's cached keys and values; empty unless they were looked at.
    """

    figures: dict[str, float]
    limits: Mapping[str, float]
    layers: list[tuple[float, float]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.beyond

    @property
    def beyond(self) -> list[str]:
        """The figures that are not within their limits, in words."""
        return [
            f"{name} {self.figures[name]:.3g}, at most {limit:g} expected"
            for name, limit in self.limits.items()
            if not self.figures[name] <= limit  # also where it is not a number
        ]


def check_first_run(bundle: Bundle, backend: Backend, name: str) -> Comparison | None:
    """Compare the bundle's stored turns with what `backend` makes of them, unless it has passed before.

    Args:
      name: of the backend, for messages.

    Returns:
      What was found; None where nothing was run, because the check has passed before or the bundle has no turns.

    Raises:
      ParityError: they differ by more than another arithmetic explains; names the layer where it begins.
      BundleError: the stored turns cannot be read.

    Cost: the stored turns, about 400 tokens and three frames, and a small cache, which the next `allocate_cache`
    replaces.
    """
    if not bundle.manifest.stored_turns:
        return None
    check = passed_checks.key_of(bundle.manifest, {"backend": name, **backend.identity})
    if passed_checks.has_passed(check):
        return None
    turns = read_stored_turns(bundle.file(bundle.manifest.stored_turns))
    found = compare_turns(bundle, backend, turns)
    if not found.passed:
        raise _refusal(bundle, backend, name, turns, found)
    passed_checks.remember(check, found.figures)
    return found


def compare_turns(bundle: Bundle, backend: Backend, turns: StoredTurns) -> Comparison:
    """Run the stored turns, and look into the cache where the outcome is wrong."""
    manifest = bundle.manifest
    decoder = Decoder(manifest, bundle.file(manifest.embedding.file), backend, sum(map(len, turns.parts)))
    encoder, frames, logits = VisionEncoder(manifest, backend), [], []
    pictures = iter(turns.pixels)
    for part in turns.parts:
        segments: list[Segment] = []
        for ids in _by_kind(part, manifest.tokens.image_pad):
            if ids[0] != manifest.tokens.image_pad:
                segments.append(ids.tolist())
                continue
            picture = next(pictures)
            resized = encoder.resize(picture)
            tokens = encoder.encode(resized, encoder.patches(resized))
            frames.append(sketch(np.asarray(tokens.embeds)))
            segments.append(tokens)
        logits.append(np.array(decoder.prefill(segments)))
    found = Comparison(_figures(turns, frames, np.stack(logits)), LIMITS[manifest.decoder.weights])
    return found if found.passed else Comparison(found.figures, found.limits, _layer_errors(manifest, backend, turns))


def _by_kind(part: np.ndarray, image_pad: int) -> list[np.ndarray]:
    """Token ids cut where text and frames meet."""
    changes = np.flatnonzero(np.diff(part == image_pad)) + 1
    return np.split(part, changes)


def _figures(turns: StoredTurns, frames: list[np.ndarray], logits: np.ndarray) -> dict[str, float]:
    """The divergence is over the stored tokens and all others together, which is less than that over all tokens."""
    shifted = np.take_along_axis(logits, turns.top_ids.astype(np.int64), axis=1)
    wanted, found = (
        _with_rest(values.astype(np.float64) - normalisers[:, None])
        for values, normalisers in ((turns.top_logits, turns.normalisers), (shifted, normalisers_of(logits)))
    )
    divergences = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    errors = [_relative(one, other) for one, other in zip(frames, turns.frames, strict=True)]
    return {
        "kl_mean": float(divergences.mean()),
        "logits_relative_error": _relative(shifted, turns.top_logits),
        "vision_relative_error": float(np.max(errors)),
        "top1_agreement": float((logits.argmax(axis=1) == turns.top_ids[:, 0]).mean()),
    }


def _with_rest(log_shares: np.ndarray) -> np.ndarray:
    """Logarithms of shares (n, k), with that of what is left to 1."""
    rest = np.log(np.maximum(1 - np.exp(log_shares).sum(axis=1), 1e-12))
    return np.concatenate([log_shares, rest[:, None]], axis=1)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference as a part of the expected norm."""
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def _layer_errors(manifest: Manifest, backend: Backend, turns: StoredTurns) -> list[tuple[float, float]]:
    """Of each layer's cached keys and values; empty where they are not kept as they were when they were stored."""
    if backend.evicts_in_place != bool(manifest.decoder.native_file):
        return []
    errors = []
    for layer in range(manifest.decoder_facts.layers):
        rows = backend.cached_rows(layer, turns.last_rows)
        keys, values = (sketch(part.reshape(len(part), -1)) for part in rows)
        errors.append((_relative(keys, turns.keys[layer]), _relative(values, turns.values[layer])))
    return errors


def _refusal(bundle: Bundle, backend: Backend, name: str, turns: StoredTurns, found: Comparison) -> ParityError:
    where = ", ".join(f"{key} {value}" for key, value in backend.identity.items())
    return ParityError(
        f"Bundle `{bundle.path.name}` does not compute on backend {name} ({where}) what it did when it was exported: "
        f"{'; '.join(found.beyond)}. {_culprit(bundle.manifest, found)}",
        hint="Use `--backend cpu`" if name != "cpu" else "Export the checkpoint again on this machine",
    )


def _culprit(manifest: Manifest, found: Comparison) -> str:
    """Where the fault begins, as far as it can be told."""
    limit = LAYER_LIMIT[manifest.decoder.weights]
    if not found.figures["vision_relative_error"] <= found.limits["vision_relative_error"]:
        return "The frames' tokens differ already: it is the vision tower"
    if not found.layers:
        return "Its layers cannot be told apart with these graphs"
    for layer, (keys, values) in enumerate(found.layers):
        part, error = ("keys", keys) if not keys <= values else ("values", values)
        if not error <= limit:
            text = f"{error:.2g}" if math.isfinite(error) else "no number"
            what = f"layer {layer - 1}" if layer else "the embeddings, or layer 0's own projection"
            return f"Layer {layer}'s cached {part} are the first that differ (relative error {text}): look at {what}"
    return f"All {len(found.layers)} layers' cached rows agree: it is the last layer's end, or the head"

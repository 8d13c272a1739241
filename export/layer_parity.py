"""Parity of a model that is too large to be run whole again and again: some of its layers, teacher-forced.

Owns the choice of the layers, and their figures. PyTorch runs the checkpoint once, all of it; each chosen layer of the
bundle is then given what that layer was given there, and what it adds is compared. So are the embedding table, the
vision tower, and the head behind PyTorch's last hidden states. Which graphs are proved is `proof`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import UsageError
from export.checkpoint import Checkpoint
from export.graph_check import GraphCheck
from export.parity import THRESHOLDS, greatest_error, relative_error, verdict
from export.probe import Probe, split_frames

if TYPE_CHECKING:
    from export.reference import Reference

ALL = "all"
WHOLE_PARAMETERS = 12 * 10**9
"""A model with more is compared in a slice unless the user says otherwise: 3B and 7B are not, 32B and 72B are."""
SLICE_LAYERS = 8
LAYER_ERROR = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.15, "int4": 0.5}
"""Greatest error of what a layer adds to a token, mean of all tokens; several times what rounding explains."""
EMBEDDING_ERROR = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.02, "int4": 0.02}
"""Greatest error of the embedding table's rows, as a part of the greatest value; it has 8 bits beside 4."""
INT8_KV_LAYER_ERROR = 0.15
"""What an int8 cache may change of it."""


def layers_to_compare(checkpoint: Checkpoint, wanted: str | int | None) -> list[int] | None:
    """The first layer, the last and others evenly between them; None: all, with the whole graph.

    Args:
      wanted: `all`, a number of layers, or None: by the model's size.

    Raises:
      UsageError: fewer than two.
    """
    count = checkpoint.facts.decoder.layers
    if wanted is None:
        wanted = ALL if checkpoint.parameters <= WHOLE_PARAMETERS else SLICE_LAYERS
    if wanted == ALL:
        return None
    if not isinstance(wanted, int) or wanted < 2:
        raise UsageError(f"Layers to compare: expected `{ALL}` or a number of 2 or more, found {wanted!r}")
    return sorted({round(layer) for layer in np.linspace(0, count - 1, min(wanted, count)).tolist()})


@dataclass(frozen=True)
class Forced:
    """What a model makes of what PyTorch gave each layer.

    Attributes:
      probes: the conversations.
      embeddings: (T, W) of the tokens of all of them.
      frames: (N, W) of each frame of theirs.
      inputs, outputs: hidden states (T, W) of each layer, by conversation. The last layer's outputs are those behind
        each part, (parts, W): the graph computes no others.
      logits: (n, V) after each part of each conversation.
    """

    probes: Sequence[Probe]
    embeddings: np.ndarray
    frames: list[np.ndarray]
    inputs: Mapping[int, list[np.ndarray]]
    outputs: Mapping[int, list[np.ndarray]]
    logits: np.ndarray


def run_whole(reference: Reference, checkpoint: Checkpoint, probes: Sequence[Probe], layers: Sequence[int]) -> Forced:
    """PyTorch, all layers, once. `layers` holds the last one."""
    frames = reference.vision([frame for probe in probes for frame in probe.frames])
    embeddings = [checkpoint.embeddings(probe.ids) for probe in probes]
    sequences = [
        (probe.embeds(rows, own), reference.positions(probe.ids, probe.grids))
        for probe, rows, own in zip(probes, embeddings, split_frames(frames, probes), strict=True)
    ]
    hidden, states = reference.hidden_and_layers(sequences, layers)
    inputs = {layer: [given for given, _ in pairs] for layer, pairs in states.items()}
    outputs = {layer: [found for _, found in pairs] for layer, pairs in states.items()}
    outputs[max(layers)] = _behind_parts(outputs[max(layers)], probes)
    logits = reference.logits(np.concatenate(_behind_parts(hidden, probes)))
    return Forced(probes, np.concatenate(embeddings), frames, inputs, outputs, logits)


def run_layers(reference: Reference, checkpoint: Checkpoint, given: Forced) -> Forced:
    """PyTorch with other weights, on the same inputs."""
    positions = [reference.positions(probe.ids, probe.grids) for probe in given.probes]
    outputs = {
        layer: reference.layer(layer, list(zip(states, positions, strict=True)))
        for layer, states in given.inputs.items()
    }
    last = max(outputs)
    outputs[last] = _behind_parts(outputs[last], given.probes)
    frames = reference.vision([frame for probe in given.probes for frame in probe.frames])
    logits = reference.logits(reference.final_norm(np.concatenate(given.outputs[last])))
    embeddings = np.concatenate([checkpoint.embeddings(probe.ids) for probe in given.probes])
    return Forced(given.probes, embeddings, frames, given.inputs, outputs, logits)


def run_graphs(graphs: GraphCheck, given: Forced) -> Forced:
    """A bundle's graphs on the same inputs, append by append."""
    outputs = {}
    for layer, states in given.inputs.items():
        appends = [probe.parted(rows) for probe, rows in zip(given.probes, states, strict=True)]
        outputs[layer] = [np.concatenate(parts) for parts in graphs.layer(layer, appends)]
    frames = graphs.vision([frame for probe in given.probes for frame in probe.frames])
    logits = graphs.head(np.concatenate(given.outputs[max(outputs)]))
    embeddings = np.concatenate([graphs.embeddings(probe.ids) for probe in given.probes])
    return Forced(given.probes, embeddings, frames, given.inputs, outputs, logits)


def _behind_parts(states: Sequence[np.ndarray], probes: Sequence[Probe]) -> list[np.ndarray]:
    return [rows[probe.ends - 1] for rows, probe in zip(states, probes, strict=True)]


def layer_errors(found: Forced, expected: Forced) -> dict[int, float]:
    """By layer: error of what it adds to a token, as a part of what it should add; the mean of all tokens."""
    errors = {}
    for layer, states in expected.inputs.items():
        short = layer == max(expected.inputs)
        inputs = np.concatenate(_behind_parts(states, expected.probes) if short else states)
        one, wanted = (np.concatenate(run.outputs[layer]) for run in (found, expected))
        added = np.linalg.norm(wanted - inputs, axis=1)
        errors[layer] = float(np.mean(np.linalg.norm(one - wanted, axis=1) / added))
    return errors


def compare_layers(
    found: Forced, expected: Forced, weights: str, exact: tuple[Forced, Forced] | None = None
) -> dict[str, Any]:
    """The manifest's `parity` of a slice, whether it passes or not.

    Args:
      exact: for int8 and int4, the graphs with products in float32, and PyTorch with the weights that they have.
    """
    rounded_error = None
    if exact is not None:
        results = [[run.embeddings, *run.frames, *run.logits] for run in exact]
        rounded_error = max(*layer_errors(*exact).values(), greatest_error(*results))
    return _verdict(found, expected, _limits(weights), rounded_error)


def compare_native_layers(
    found: Forced, stock: Forced, expected: Forced, weights: str, kv_dtypes: tuple[str, ...]
) -> dict[str, Any]:
    """The same of the native graphs.

    Args:
      stock: what the stock graphs made of the same weights. An int8 cache is judged by the distance from them.
    """
    limits, figures = _limits(weights), {}
    if "int8" in kv_dtypes:
        figures["int8_kv_layer_error"] = max(layer_errors(found, replace(expected, outputs=stock.outputs)).values())
        limits["int8_kv_layer_error"] = INT8_KV_LAYER_ERROR
        limits["layer_error_max"] = max(limits["layer_error_max"], INT8_KV_LAYER_ERROR)
    return _verdict(found, expected, limits, None, figures)


def _limits(weights: str) -> dict[str, float]:
    own = {"embedding_error": EMBEDDING_ERROR[weights], "layer_error_max": LAYER_ERROR[weights]}
    return {**THRESHOLDS[weights], **own}


def _verdict(
    found: Forced,
    expected: Forced,
    limits: dict[str, float],
    rounded_error: float | None,
    more: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    errors = layer_errors(found, expected)
    vision_error = greatest_error(found.frames, expected.frames)
    embedding_error = relative_error(found.embeddings, expected.embeddings)
    figures = {"embedding_error": embedding_error, "layer_error_max": max(errors.values()), **(more or {})}
    report = verdict(vision_error, found.logits, expected.logits, limits, rounded_error, figures)
    worst = sorted(errors, key=lambda layer: -errors[layer])
    return {**report, "layer_errors": {str(layer): float(f"{errors[layer]:.3g}") for layer in worst}}

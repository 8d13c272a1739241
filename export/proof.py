"""Proves a written bundle: what its files say, what its weights are, and what its graphs compute.

Owns which graphs are run against which reference, and the order of the checks. The figures and verdicts are `parity`'s
and `held_out`'s, what can be told without running anything is `structure`'s and `weight_audit`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge import contract, native
from edge.contract import TokenIds
from export import layer_parity
from export.checkpoint import Checkpoint
from export.diagnosis import diagnose
from export.expected import IN_NUMPY, Expected, compute_expected, float_held_out
from export.graph_check import GraphCheck
from export.graph_kinds import NativeGraphs
from export.graph_session import EXACT
from export.held_out import Tally
from export.limits import held_out_limits, keeps
from export.parity import Computed, compare, compare_native, rounded_relative_error, run_probe
from export.plan import QUANTIZED
from export.probe import Probe, split_frames
from export.rounded import RoundedCheckpoint
from export.structure import decoder_problems, vision_problems
from export.turns import Conversation
from export.weight_audit import weight_problems
from export.weight_store import StoredTensor
from export.weight_writer import WeightWriter

PARITY_BASE_BYTES = 700 * 10**6
"""What Python, torch, transformers and ONNX Runtime take before any weight, with room for activations."""
SMALLEST_BUDGET_BYTES = 128 << 20

Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """A bundle's weights on disk, and in which precisions.

    Args:
      embedding: the embedding table as "embedding", with its scales as "embedding.scale" where it is quantised.
      kv_dtypes: of the native decoder's caches; None if there are no native graphs.
    """

    folder: Path
    checkpoint: Checkpoint
    weights: str
    vision: WeightWriter
    decoder: WeightWriter
    embedding: Mapping[str, StoredTensor]
    kv_dtypes: tuple[str, ...] | None

    def graphs(self, **options: Any) -> GraphCheck:
        """The graphs, to be run a few layers at a time where memory asks for it."""
        stored = {**self.embedding, **self.decoder.stored}
        budget_bytes = _weights_budget_bytes(self.checkpoint)
        return GraphCheck(self.folder, self.checkpoint.facts, self.vision.stored, stored, budget_bytes, **options)

    def native_graphs(self) -> GraphCheck | None:
        """The native graphs, where there are any and their operators are built."""
        if self.kv_dtypes is None or native.available() is not None:
            return None
        return self.graphs(kind=NativeGraphs(str(native.library_path()), self.kv_dtypes))

    def rounded(self) -> RoundedCheckpoint:
        """The checkpoint with the values that were written."""
        return RoundedCheckpoint.of(self.checkpoint, self.folder, [self.vision, self.decoder], self.embedding)


@dataclass(frozen=True)
class HeldOut:
    """Turns that nothing was tuned on, and how far a bundle may be from the original on them.

    Args:
      talks: conversations of the unquantised model; those without held-out turns are left out.
      tokens: how states are spelt.
      interval_s: stream seconds from one turn to the next.
      tightened: the user's limits, by figure.
    """

    talks: Sequence[Conversation]
    tokens: TokenIds
    interval_s: int = 1
    tightened: Mapping[str, float] = field(default_factory=dict)


class Watcher(Protocol):
    """Told what the stock graphs make of the probe. `watch` is `GraphCheck.watch`."""

    def watch(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None: ...

    def finish(self, found: Computed) -> None: ...


def prove(
    written: Written,
    probe: Probe,
    recorded: Expected | None,
    held_out: HeldOut | None = None,
    step: Step | None = None,
    layers: Sequence[int] | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Check everything that can be checked here. Returns the manifest's `parity`, whether it passes or not.

    Args:
      recorded: what PyTorch computed earlier for the probe; without it, PyTorch is asked. With it, held-out turns are
        compared with the export's own arithmetic.
      step: called as (done, total).
      layers: compare only these, teacher-forced (see `layer_parity`), over the probe and the held-out conversations;
        needs PyTorch. None: all, in the graphs as they are.
      watcher: told what all layers of the graphs make of the probe, also where only some are compared.
    """
    talks = [talk for talk in held_out.talks if talk.held_out_parts] if held_out else []
    report = step or (lambda done, total: None)
    if layers:
        report(0, 1)
        if watcher is not None:
            _run_stock(written, probe, watcher)
        parity = _layers(written, probe, talks, layers)
        report(1, 1)
        return parity
    report(0, 1 + bool(talks))
    expected = recorded or compute_expected(written.checkpoint, probe, talks)
    parity = _whole(written, probe, expected, watcher, torch=recorded is None)
    report(1, 1 + bool(talks))
    if held_out is not None and talks:
        by_torch = expected.reference, expected.held_out
        answers = by_torch if recorded is None else (IN_NUMPY, float_held_out(written.checkpoint, talks))
        parity["held_out"] = _held_out(written, held_out, talks, *answers)
        report(2, 2)
    return parity


def _whole(
    written: Written, probe: Probe, expected: Expected, watcher: Watcher | None, *, torch: bool
) -> dict[str, Any]:
    """The probe through the whole graphs.

    Args:
      torch: whether PyTorch may be asked about the rounded weights, too.
    """
    found, slices = _run_stock(written, probe, watcher)
    rounded_error = None
    if torch and written.weights in QUANTIZED:
        exact = run_probe(probe, written.graphs(accuracy_level=EXACT))
        rounded_error = rounded_relative_error(exact, compute_expected(written.rounded(), probe))
    parity = {**compare(found, expected, written.weights, rounded_error), "slices": slices}
    if native_graphs := written.native_graphs():
        own = run_probe(probe, native_graphs)
        figures = compare_native(own, found, expected, written.weights, written.kv_dtypes or ())
        parity["native"] = {"instruction_set": native.instruction_set(), **figures}
    return {**parity, "problems": [*expected.config_problems, *_problems(written)]}


def _run_stock(written: Written, probe: Probe, watcher: Watcher | None) -> tuple[Computed, dict[str, int]]:
    """What the stock graphs make of the probe, and in how many parts they were run."""
    graphs = written.graphs()
    if watcher is not None:
        graphs.watch = watcher.watch
    found = run_probe(probe, graphs)
    if watcher is not None:
        watcher.finish(found)
    return found, graphs.slices


def _layers(written: Written, probe: Probe, talks: Sequence[Conversation], layers: Sequence[int]) -> dict[str, Any]:
    """The same of some layers, over held-out conversations too."""
    from export.reference import Reference

    reference = Reference(written.checkpoint)
    expected = layer_parity.run_whole(reference, written.checkpoint, [probe, *talks], layers)
    found, exact = layer_parity.run_graphs(written.graphs(), expected), None
    if written.weights in QUANTIZED:
        graphs = layer_parity.run_graphs(written.graphs(accuracy_level=EXACT), expected)
        exact = graphs, layer_parity.run_layers(Reference(written.rounded()), written.rounded(), expected)
    parity = {
        "reference": reference.version,
        "compared_layers": list(layers),
        "layers": written.checkpoint.facts.decoder.layers,
        "clips": [talk.name for talk in talks],
        "turns": len(expected.frames),
        "appends": len(expected.logits),
        **layer_parity.compare_layers(found, expected, written.weights, exact),
    }
    if native_graphs := written.native_graphs():
        own = layer_parity.run_graphs(native_graphs, expected)
        kv_dtypes = written.kv_dtypes or ()
        figures = layer_parity.compare_native_layers(own, found, expected, written.weights, kv_dtypes)
        parity["native"] = {"instruction_set": native.instruction_set(), **figures}
    return {**parity, "problems": [*reference.config_problems(), *_problems(written)]}


def _problems(written: Written) -> list[str]:
    """What is wrong with the files themselves."""
    facts, stored = written.checkpoint.facts, {**written.embedding, **written.decoder.stored}
    files = [(contract.DECODER_FILE, contract.VISION_FILE)]
    if written.kv_dtypes is not None:
        files.append((contract.NATIVE_DECODER_FILE, contract.NATIVE_VISION_FILE))
        files.append((contract.TENSORRT_DECODER_FILE, contract.TENSORRT_VISION_FILE))
    found = []
    for decoder_file, vision_file in files:
        found += decoder_problems(written.folder / decoder_file, facts.decoder, stored)
        found += vision_problems(written.folder / vision_file, facts.vision, written.vision.stored)
    return found + weight_problems(written.checkpoint, written.rounded())


def _held_out(
    written: Written, held_out: HeldOut, talks: Sequence[Conversation], reference: str, expected: Sequence[np.ndarray]
) -> dict[str, Any]:
    """What a user would feel: the graphs that the runtime prefers, on turns that nothing was tuned on.

    Args:
      reference: who computed the `expected` logits (n, V) behind each conversation's held-out parts.
    """
    native_graphs = written.native_graphs()
    graphs = native_graphs or written.graphs()
    tally = Tally(held_out.tokens, held_out.interval_s)
    for talk, wanted, found in zip(talks, expected, held_out_logits(graphs, talks), strict=True):
        tally.add(talk, wanted, found)
    figures = tally.figures()
    kv_dtypes = written.kv_dtypes if native_graphs else None
    limits = held_out_limits(written.weights, kv_dtypes, held_out.tightened, tally.counts())
    passed = all(keeps(figures, name, limit) for name, limit in limits.items())
    report = {
        "reference": reference,
        "clips": [talk.name for talk in talks],
        "replies": "/".join(sorted({talk.replies for talk in talks})),
        "graphs": "native" if native_graphs else "stock",
        **figures,
        "thresholds": limits,
        "passed": passed,
    }
    if not passed:
        report["diagnosis"] = diagnose(written, held_out, talks, limits)
    return report


def held_out_logits(graphs: GraphCheck, talks: Sequence[Conversation]) -> list[np.ndarray]:
    """What a bundle's graphs decide: logits (n, V) behind each conversation's held-out parts."""
    frames = graphs.vision([frame for talk in talks for frame in talk.frames])
    return graphs.decoders(
        [
            (talk.appends(graphs.embeddings(talk.ids), own), talk.held_out_parts)
            for talk, own in zip(talks, split_frames(frames, talks), strict=True)
        ]
    )


def _weights_budget_bytes(checkpoint: Checkpoint) -> int:
    """Memory for weights while parity is checked: the whole export stays under twice the largest tensor + 1 GB."""
    largest = max(entry.bytes for entry in checkpoint.entries.values())
    return max(SMALLEST_BUDGET_BYTES, 2 * largest + 10**9 - PARITY_BASE_BYTES)

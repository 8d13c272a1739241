"""Proves a written bundle against PyTorch: the stock graphs, and the native ones where their operators are built.

Owns which graphs are run against which reference. The figures and the verdict are `parity`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge import native
from export.checkpoint import Checkpoint
from export.expected import Expected, compute_expected
from export.graph_check import GraphCheck
from export.graph_kinds import NativeGraphs
from export.graph_session import EXACT
from export.parity import RoundedCheck, compare, compare_native
from export.probe import Probe
from export.rounded import RoundedCheckpoint
from export.weight_store import StoredTensor
from export.weights import QUANTIZED, WeightWriter

PARITY_BASE_BYTES = 700 * 10**6
"""What Python, torch, transformers and ONNX Runtime take before any weight, with room for activations."""
SMALLEST_BUDGET_BYTES = 128 << 20


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


def prove(written: Written, probe: Probe, recorded: Expected | None) -> dict[str, Any]:
    """Run everything that can be run here. Returns the manifest's `parity`, whether it passes or not.

    Args:
      recorded: what PyTorch computed earlier; without it, PyTorch is asked.
    """
    expected = recorded or compute_expected(written.checkpoint, probe)
    check = None
    if recorded is None and written.weights in QUANTIZED:
        writers = [written.vision, written.decoder]
        rounded = RoundedCheckpoint.of(written.checkpoint, written.folder, writers, written.embedding)
        check = RoundedCheck(written.graphs(accuracy_level=EXACT), compute_expected(rounded, probe))
    parity = compare(probe, written.graphs(), expected, written.weights, check)
    if written.kv_dtypes is not None and native.available() is None:
        kind = NativeGraphs(str(native.library_path()), written.kv_dtypes)
        figures = compare_native(probe, written.graphs(kind=kind), expected, written.weights, written.kv_dtypes)
        parity["native"] = {"instruction_set": native.instruction_set(), **figures}
    return parity


def _weights_budget_bytes(checkpoint: Checkpoint) -> int:
    """Memory for weights while parity is checked: the whole export stays under twice the largest tensor + 1 GB."""
    largest = max(entry.bytes for entry in checkpoint.entries.values())
    return max(SMALLEST_BUDGET_BYTES, 2 * largest + 10**9 - PARITY_BASE_BYTES)

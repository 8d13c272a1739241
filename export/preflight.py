"""What an export will take, said before it starts: bytes on disk, and memory.

Owns the estimates. Does not refuse anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.contract import TENSORRT_INT4_BLOCKS
from export.calibration_needs import CalibrationNeeds
from export.checkpoint import Checkpoint
from export.plan import QUANTIZED, Plan, value_bytes
from export.tensor_names import DECODER_MAPS, EMBEDDING, HEAD, TEXT, VISUAL
from export.weight_writer import EMBEDDING_BLOCK

BASE_MEMORY_BYTES = 1_100_000_000
"""Python, torch, transformers and ONNX Runtime, with the room that the parity check takes for layers."""


@dataclass(frozen=True)
class Preflight:
    """An export that could be started.

    Args:
      bundle_bytes: about what the bundle takes on disk.
      kept_bytes: on disk too until it is complete, for an export that goes on after an interruption.
      left_behind_bytes: what an interrupted export has left there, to be gone on with or removed.
      disk_free_bytes: of the bundle's disk, without what was left behind.
      memory_bytes: about what the process takes at its peak.
      known_hashes: files that will be compared with a hash that their download left.
      calibration_clips, calibration_turns, calibration_tokens: what weights and caches are fitted to.
    """

    bundle_bytes: int
    kept_bytes: int
    left_behind_bytes: int
    disk_free_bytes: int
    memory_bytes: int
    parameters: int
    layers: int
    known_hashes: int
    calibration_clips: int
    calibration_turns: int
    calibration_tokens: int
    notes: tuple[str, ...]


def bundle_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """About what a bundle takes: each part in its precision, with the scales of its blocks."""
    total = 0.0
    for name, entry in checkpoint.entries.items():
        if name == EMBEDDING:
            total += entry.count * value_bytes(plan.embedding, EMBEDDING_BLOCK)
        elif name != HEAD:
            part = plan.vision if name.startswith(VISUAL) else _planned(plan, name)
            total += entry.count * value_bytes(part if len(entry.shape) > 1 else "fp32", plan.block)
            if part == "int4" and plan.block in TENSORRT_INT4_BLOCKS:
                total += entry.count * 2 / plan.block  # the scales once more, in float16, for TensorRT
    if plan.head != plan.embedding or plan.head in QUANTIZED or not checkpoint.facts.decoder.tied_embeddings:
        total += checkpoint.entries[checkpoint.head_name].count * value_bytes(plan.head, plan.block)
    return int(total * 1.03)  # rows filled up to whole blocks, page alignment, the graphs


def _planned(plan: Plan, tensor: str) -> str:
    """The precision of a decoder's tensor."""
    layer = tensor.removeprefix(TEXT).split(".")
    if layer[0] != "layers":
        return plan.weights
    parts = {source: part for part, sources in DECODER_MAPS.items() for source in sources}
    return plan.precision(f"layers.{layer[1]}.{parts.get('.'.join(layer[2:4]))}")


def memory_bytes(checkpoint: Checkpoint, turns: CalibrationNeeds | None = None) -> int:
    """About what an export holds at its peak, whatever the model's size: its largest tensor counts, not their sum.

    Args:
      turns: what the clips take: more than all else where much is calibrated on; a part is held beside all else.
    """
    turns = turns or CalibrationNeeds()
    largest = max(entry.bytes for entry in checkpoint.entries.values())
    return max(BASE_MEMORY_BYTES + 2 * largest + turns.held_bytes, turns.memory_bytes)

"""What the checkpoint computes: asked from transformers on the spot, or, for the probe, recorded earlier with it.

Owns the record's format, and its tie to the checkpoint and the probe it was made from.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import CheckpointError
from export.checkpoint import Checkpoint
from export.fingerprint import add_file
from export.float_model import FloatModel
from export.probe import Probe, split_frames

if TYPE_CHECKING:
    from export.turns import Conversation

IN_NUMPY = "the export's own arithmetic in numpy, float32"


@dataclass(frozen=True)
class Expected:
    """Embeddings (N, W) of each frame and logits (n, V) after each part, float32, and who computed them.

    Attributes:
      config_problems: where the reference reads the config otherwise than we do; not recorded.
      held_out: logits (n, V) float32 behind each conversation's held-out parts; not recorded.
    """

    reference: str
    frames: list[np.ndarray]
    logits: np.ndarray
    config_problems: list[str] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)


def compute_expected(
    checkpoint: Checkpoint, probe: Probe, talks: Sequence[Conversation] = (), dtype: str = "float32"
) -> Expected:
    """Run the checkpoint in transformers, each whole conversation in one pass, all of them in one reading.

    Args:
      talks: conversations whose held-out parts are decided beside the probe.
      dtype: see `Reference`.

    Raises:
      UsageError: torch or transformers is not installed.
    """
    from export.reference import Reference

    reference, probes = Reference(checkpoint, dtype), [probe, *talks]
    frames = reference.vision([frame for one in probes for frame in one.frames])
    sequences = [
        (one.embeds(checkpoint.embeddings(one.ids), own), reference.positions(one.ids, one.grids))
        for one, own in zip(probes, split_frames(frames, probes), strict=True)
    ]
    ends = [probe.ends, *(talk.ends[talk.held_out_parts] for talk in talks)]
    read = [hidden[behind - 1] for hidden, behind in zip(reference.hidden(sequences), ends, strict=True)]
    logits = reference.logits(np.concatenate(read))
    own, *held_out = np.split(logits, np.cumsum([len(rows) for rows in read])[:-1])
    return Expected(reference.version, frames[: len(probe.frames)], own, reference.config_problems(), held_out)


def float_held_out(checkpoint: Checkpoint, talks: Sequence[Conversation]) -> list[np.ndarray]:
    """`Expected.held_out` by the export's own arithmetic (see `float_model`), which a test holds to transformers."""
    model = FloatModel(checkpoint)
    return [float_logits(model, talk, talk.visual) for talk in talks]


def float_logits(model: FloatModel, talk: Conversation, visual: list[np.ndarray] | None = None) -> np.ndarray:
    """Logits (n, V) behind the held-out parts, in one pass of `model`.

    Args:
      visual: what `model` makes of the frames, where that is known.
    """
    embeds = talk.embeds(model.embeddings(talk.ids), visual or model.vision(talk.frames))
    hidden = model.hidden(embeds, talk.positions, model.caches())
    return model.logits(hidden[talk.ends[talk.held_out_parts] - 1])


def save_expected(path: Path, expected: Expected, checkpoint: Checkpoint, probe: Probe) -> None:
    """Record what PyTorch computed, for machines without it."""
    arrays: dict[str, Any] = {f"frame_{i}": frame for i, frame in enumerate(expected.frames)}
    arrays["reference"] = np.array(expected.reference)
    arrays["made_from"] = np.array(_made_from(checkpoint, probe))
    np.savez_compressed(path, logits=expected.logits, **arrays)


def load_expected(path: Path, checkpoint: Checkpoint, probe: Probe) -> Expected:
    """Read a record.

    Raises:
      CheckpointError: there is none, or it was made from another checkpoint or by another version.
    """
    try:
        with np.load(path, allow_pickle=False) as record:
            made_from = str(record["made_from"])
            frames = [record[f"frame_{i}"] for i in range(len(probe.frames))]
            expected = Expected(f"{record['reference']} (recorded)", frames, record["logits"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"The recorded reference `{path}` cannot be read: {error}", hint="Record it again, or copy it again"
        ) from None
    if made_from != _made_from(checkpoint, probe):
        raise CheckpointError(
            f"The recorded reference `{path.name}` was made from another checkpoint than `{checkpoint.folder}`",
            hint="Record it again on a machine with torch, or export without it",
        )
    return expected


def _made_from(checkpoint: Checkpoint, probe: Probe) -> str:
    """A digest of the checkpoint's config and weight files and of the probe's tokens and pixels."""
    digest = hashlib.sha256(checkpoint.config_sha256.encode())
    if checkpoint.adapter:
        digest.update(checkpoint.adapter.config_sha256.encode())
    for path in checkpoint.files:
        add_file(digest, path)
    digest.update(probe.ids.astype("<i8").tobytes())
    for patches, _, _ in probe.frames:
        digest.update(patches.astype("<f4").tobytes())
    return digest.hexdigest()

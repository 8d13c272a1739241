"""Are the weights in a bundle the checkpoint's? Each stored weight is read back and compared with its tensor.

Owns the comparison and how far rounding may move a weight. It finds what results may hide behind rounding errors: a
matrix that was transposed, a bias left out, two layers exchanged. Runs no graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.checkpoint import Checkpoint
from export.rounded import RoundedCheckpoint
from export.tensor_names import EMBEDDING, TEXT, VISUAL
from export.weight_store import StoredTensor

LIMITS = {"float32": 1e-6, "float16": 2e-3, "int8": 0.05, "int4": 0.4}
"""Greatest relative error of a weight's sample by stored dtype: rounding explains about a quarter of it."""
SAMPLE_ROWS = 64


@dataclass(frozen=True)
class StoredError:
    """How far a stored weight is from its tensor.

    Attributes:
      error: norm of the difference, as a part of the tensor's norm, over a sample of its rows.
    """

    name: str
    dtype: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether rounding to this dtype explains it."""
        return self.error <= LIMITS[self.dtype]  # False for what is not a number


def audit(checkpoint: Checkpoint, rounded: RoundedCheckpoint) -> Iterator[StoredError]:
    """Every tensor of the checkpoint beside what a bundle has of it: vectors whole, matrices by their first rows.

    Args:
      rounded: the same checkpoint, read from the bundle's weight files.
    """
    for name, place in rounded.vectors.items():
        yield StoredError(name, place.dtype, relative_error(_values(rounded.bundle, place), checkpoint.read(name)))
    for name, matrix in rounded.matrices.items():
        if name == checkpoint.head_name:
            continue
        if len(checkpoint.entries[name].shape) == 2:
            wanted, found = next(checkpoint.rows(name, SAMPLE_ROWS)), rounded.first_rows(name, SAMPLE_ROWS)
        else:
            wanted, found = checkpoint.read(name).sum(axis=2), rounded.read(name).sum(axis=2)
        yield StoredError(name, matrix.weight.dtype, relative_error(found, wanted))
    if rounded.embedding is not None:
        wanted, found = (one.token_rows(0, SAMPLE_ROWS) for one in (checkpoint, rounded))
        yield StoredError(EMBEDDING, rounded.embedding.dtype, relative_error(found, wanted))
    head = rounded.matrices[checkpoint.head_name].weight if checkpoint.head_name in rounded.matrices else rounded.head
    if head is not None:
        wanted, found = (next(one.head_rows(SAMPLE_ROWS)) for one in (checkpoint, rounded))
        yield StoredError("head", head.dtype, relative_error(found, wanted))


def _values(bundle: Path, place: StoredTensor) -> np.ndarray:
    return np.fromfile(bundle / place.file, np.float32, place.length // 4, offset=place.offset)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference, as a part of the norm of `wanted`."""
    difference = float(np.linalg.norm(found.astype(np.float64) - wanted))
    norm = float(np.linalg.norm(wanted))
    return difference / norm if norm else difference


def weight_problems(checkpoint: Checkpoint, rounded: RoundedCheckpoint) -> list[str]:
    """A sentence for each weight that rounding does not explain."""
    return [
        f"stored weight `{short_name(one.name)}` differs from the checkpoint's tensor by {one.error:.2g} of its norm; "
        f"rounding to {one.dtype} explains at most {LIMITS[one.dtype]:g}"
        for one in audit(checkpoint, rounded)
        if not one.passed
    ]


def short_name(name: str) -> str:
    """A tensor's name without what all have in common."""
    return name.removeprefix(TEXT).replace(VISUAL, "visual.")

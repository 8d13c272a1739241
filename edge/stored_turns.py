"""A few turns of a stream that a bundle carries, with what its graphs made of them when it was exported.

Owns the file's format, and the sketches by which long vectors are compared. Runs no graph: `first_run` does.

A sketch of a vector is its product with fixed random signs, `SKETCH_WIDTH` numbers. The sketch of a difference is the
difference of the sketches, and its norm estimates the difference's own.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.errors import BundleError

SKETCH_WIDTH = 16
TOP_LOGITS = 64
_SEED = 20250
_RAW_BITS = 64


@dataclass(frozen=True)
class StoredTurns:
    """A conversation in parts, as a runtime appends them, and what came of it.

    Attributes:
      pixels: each frame, (H, W, 3) uint8, of the size that the model takes.
      parts: token ids of each part, int32; a frame stands in the places of `image_pad`.
      frames: sketches of each frame's visual tokens, (N, S) float32.
      top_ids: (n, k) int32, the likeliest tokens behind each part.
      top_logits: (n, k) float32, theirs.
      normalisers: (n,) float32, the logarithm of the sum of all tokens' exponentials.
      keys, values: (L, n, S) float32, sketches of the rows that the native graph caches for each part's last token.
    """

    pixels: list[np.ndarray]
    parts: list[np.ndarray]
    frames: list[np.ndarray]
    top_ids: np.ndarray
    top_logits: np.ndarray
    normalisers: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    @property
    def last_rows(self) -> np.ndarray:
        """(n,) the row of each part's last token in a cache that is filled from its first row."""
        return np.cumsum([len(part) for part in self.parts]) - 1

    def to_bytes(self) -> bytes:
        """The file's content; the same values give the same bytes."""
        arrays = {name: getattr(self, name) for name in _WHOLE}
        arrays["ids"] = np.concatenate(self.parts).astype(np.int32)
        arrays["lengths"] = np.array([len(part) for part in self.parts], np.int32)
        for name, frames in (("pixels", self.pixels), ("frames", self.frames)):
            arrays.update({f"{name}.{i}": frame for i, frame in enumerate(frames)})
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()


_WHOLE = ("top_ids", "top_logits", "normalisers", "keys", "values")


def read_stored_turns(path: Path) -> StoredTurns:
    """Read the file of a bundle.

    Raises:
      BundleError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        pixels, frames = (list(_numbered(arrays, name)) for name in ("pixels", "frames"))
        parts = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        turns = StoredTurns(pixels, parts, frames, **{name: arrays[name] for name in _WHOLE})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"Bundle file `{path.name}` cannot be read: {error}",
            hint="Copy the bundle again, or export it again with `streamo-edge export`",
        ) from None
    return turns


def _numbered(arrays: dict[str, np.ndarray], name: str) -> Iterator[np.ndarray]:
    i = 0
    while f"{name}.{i}" in arrays:
        yield arrays[f"{name}.{i}"]
        i += 1


def sketch(rows: np.ndarray) -> np.ndarray:
    """Sketches (..., S) float32 of vectors (..., n)."""
    # Raw bits of a named generator: numpy promises the same for ever, and promises less of everything made from them.
    raw = np.random.PCG64(_SEED).random_raw(rows.shape[-1] * SKETCH_WIDTH // _RAW_BITS + 1)
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), count=rows.shape[-1] * SKETCH_WIDTH)
    signs = bits.reshape(-1, SKETCH_WIDTH).astype(np.float32) * 2 - 1
    return np.asarray(rows.astype(np.float32) @ signs, np.float32)


def top_of(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The likeliest tokens of logits (n, V): ids (n, k) int32, their logits (n, k) and normalisers (n,), float32."""
    count = min(TOP_LOGITS, logits.shape[1])
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return ids.astype(np.int32), np.take_along_axis(logits, ids, axis=1), normalisers_of(logits)


def normalisers_of(logits: np.ndarray) -> np.ndarray:
    """(n,) float32: the logarithm of the sum of the exponentials of each row of logits (n, V)."""
    greatest = logits.max(axis=1).astype(np.float64)
    sums = np.exp(logits.astype(np.float64) - greatest[:, None]).sum(axis=1)
    return np.asarray(greatest + np.log(sums), np.float32)

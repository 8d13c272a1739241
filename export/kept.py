"""What an interrupted export has worked out beside its data files, a file each, so that the next one has it.

Owns how arrays and facts are written there, and that a damaged file counts for none. Knows neither what they mean nor
which inputs they belong to, which is the folder's key (see `resume`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".kept"
READ_BYTES = 8 << 20
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Record:
    """What was kept under one name: facts as JSON can hold them, and arrays by name."""

    facts: dict[str, Any]
    arrays: Mapping[str, np.ndarray]


class Kept:
    """Records in an unfinished folder. A name that is kept again replaces what was there, whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, name: str, record: Record) -> None:
        """Write a line of JSON, the arrays' bytes, and the SHA-256 of both."""
        kinds = [[key, array.dtype.str, list(array.shape)] for key, array in record.arrays.items()]
        path, digest = self._path(name), hashlib.sha256()
        unfinished = path.with_suffix(path.suffix + ".new")
        with unfinished.open("wb") as file:
            head = json.dumps({"facts": record.facts, "arrays": kinds}, allow_nan=False).encode() + b"\n"
            parts: list[bytes | memoryview] = [head]
            parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in record.arrays.values()]
            for part in parts:
                file.write(part)
                digest.update(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def load(self, name: str) -> Record | None:
        """What was kept, or None: nothing, or it is damaged."""
        path = self._path(name)
        if not path.is_file() or not _is_whole(path):
            return None
        with path.open("rb") as file:
            document = json.loads(file.readline())
            arrays = {}
            for key, dtype, shape in document["arrays"]:
                arrays[key] = np.fromfile(file, np.dtype(dtype), math.prod(shape)).reshape(shape)
        return Record(document["facts"], arrays)

    def remove(self) -> None:
        """The export is complete."""
        for path in self._folder.glob(f"*{SUFFIX}*"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / (name + SUFFIX)


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the hash of what is in front of it."""
    left, digest = path.stat().st_size - DIGEST_BYTES, hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(READ_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
        return left == 0 and file.read() == digest.digest()

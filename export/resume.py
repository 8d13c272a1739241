"""What an interrupted export has finished, so that the next one with the same inputs goes on behind it.

Owns the journal in the unfinished folder and the digest that says which inputs it belongs to. Data files are written in
one fixed order (see `weight_store`), so the journal needs no more than the length and the hash that a file had after
each group of tensors, and their kinds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint import Checkpoint
from export.fingerprint import code_fingerprint
from export.kept import SUFFIX as KEPT

JOURNAL_FILE = "journal.jsonl"
KEY_LETTERS = 16

Kind = tuple[str, tuple[int, ...]]
"""Of a tensor: dtype and shape."""


@dataclass(frozen=True)
class Finished:
    """The tensors that a data file holds for certain, in order, and the file's length and hash at their end."""

    kinds: tuple[Kind, ...]
    bytes: int
    sha256: str


class Journal:
    """The groups of tensors that were finished, a line each.

    A line that was cut short, and all behind it, count for nothing; a power failure may lose lines and bytes, which the
    hashes tell.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL_FILE
        self._finished: dict[str, Finished] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []:
            try:
                entry = json.loads(line)
                kinds = tuple((str(dtype), tuple(int(n) for n in shape)) for dtype, shape in entry["tensors"])
                self._add(str(entry["file"]), kinds, int(entry["bytes"]), str(entry["sha256"]))
            except (ValueError, TypeError, KeyError):
                break

    @property
    def bytes(self) -> int:
        """Bytes of all that is finished."""
        return sum(finished.bytes for finished in self._finished.values())

    def finished(self, file: str) -> Finished | None:
        return self._finished.get(file)

    def record(self, file: str, kinds: tuple[Kind, ...], length: int, sha256: str) -> None:
        """Note that `kinds` follow what `file` held before, and end at `length`."""
        line = {"file": file, "tensors": kinds, "bytes": length, "sha256": sha256}
        with self._path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
        self._add(file, kinds, length, sha256)

    def forget(self, file: str) -> None:
        """What the journal says about `file` does not hold: write it anew."""
        self._finished.pop(file, None)
        kept, self._finished = self._finished, {}
        self._path.unlink(missing_ok=True)
        for name, finished in kept.items():
            self.record(name, finished.kinds, finished.bytes, finished.sha256)

    def remove_others(self) -> None:
        """Remove the files that hold nothing that could be gone on with."""
        for path in self._folder.iterdir():
            if path.name not in (JOURNAL_FILE, *self._finished) and path.suffix != KEPT:
                path.unlink()

    def remove(self) -> None:
        """The export is complete."""
        self._path.unlink(missing_ok=True)

    def _add(self, file: str, kinds: tuple[Kind, ...], length: int, sha256: str) -> None:
        before = self._finished.get(file)
        self._finished[file] = Finished((*before.kinds, *kinds) if before else kinds, length, sha256)


def resume_key(checkpoint: Checkpoint, small_files: Mapping[str, bytes], options: Mapping[str, Any]) -> str:
    """A digest of all that a bundle's bytes depend on; exports with the same one may share an unfinished folder.

    Tensor files count by name, size and time of change, for hashing them would take as long as exporting a part of
    them; small files by content; and the code that makes bundles, so that a new version starts afresh.

    Args:
      options: of the export, as JSON can hold them.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    digest.update(checkpoint.config_sha256.encode())
    for path in checkpoint.files:
        status = path.stat()
        facts = [path.name, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev]
        digest.update(json.dumps(facts).encode())
    if checkpoint.adapter:
        digest.update(json.dumps(checkpoint.adapter.provenance(), sort_keys=True).encode())
    for name, content in sorted(small_files.items()):
        digest.update(json.dumps([name, hashlib.sha256(content).hexdigest()]).encode())
    digest.update(code_fingerprint().encode())
    return digest.hexdigest()[:KEY_LETTERS]

"""SHA-256 of what a bundle is made from: of large files, a piece at a time, and of the code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edge import contract, preprocess, prompt, stored_turns
from edge.errors import CheckpointError

READ_BYTES = 8 << 20


def add_file(digest: Any, path: Path) -> None:
    """Feed a file of a checkpoint to a hash.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {error.strerror or error}", hint="Check the file's permissions and its disk"
        ) from None


def code_fingerprint(*others: Path) -> str:
    """Of the code that makes bundles, and of `others`: a checkout changes while its version stays the same."""
    seams = [Path(str(module.__file__)) for module in (contract, preprocess, prompt, stored_turns)]
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), *seams, *others):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]

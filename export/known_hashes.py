"""The hashes that a download left beside a checkpoint's files, and whether the files still have them.

Owns the three places where such hashes are found: `SHA256SUMS`, the records of a Hugging Face download into a folder
(`.cache/huggingface/download/NAME.metadata`), and the names of the files in Hugging Face's own cache. Only SHA-256
counts; git's hashes of small files are of another kind.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from edge.errors import CheckpointError
from export.fingerprint import add_file

SUMS_FILE = "SHA256SUMS"
DOWNLOADS = Path(".cache") / "huggingface" / "download"
SHA256 = re.compile(r"[0-9a-f]{64}")
SUMS_LINE = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(.+)")
CLOCK_SLACK_S = 1.0


def known_hash(path: Path) -> tuple[str, str] | None:
    """The SHA-256 that a file should have, and who says so; None: nobody does."""
    folder, name = path.parent, path.name
    return _from_sums(folder, name) or _from_download(folder, name) or _from_cache(path)


def check_files(paths: Iterable[Path], report: Callable[[int, int], None]) -> None:
    """Compare every file with its known hash, where there is one.

    Cost: such files are read once more, at about the speed of the disk.

    Args:
      report: called as (files done, files to do); not at all if there are none.

    Raises:
      CheckpointError: a file has another hash; names it and both hashes.
    """
    known = [(path, *record) for path in paths if (record := known_hash(path)) is not None]
    for done, (path, expected, source) in enumerate(known):
        report(done, len(known))
        digest = hashlib.sha256()
        add_file(digest, path)
        if (found := digest.hexdigest()) != expected:
            raise CheckpointError(
                f"`{path.name}` has the SHA-256 {found[:16]}..., expected {expected[:16]}... as {source} gives it",
                hint="The file is damaged or was changed: download it again, or remove the record if it was changed "
                "on purpose",
            )
    if known:
        report(len(known), len(known))


def _from_sums(folder: Path, name: str) -> tuple[str, str] | None:
    for line in _lines(folder / SUMS_FILE):
        match = SUMS_LINE.fullmatch(line)
        if match and match[2].removeprefix("./") == name:
            return match[1].lower(), f"`{SUMS_FILE}`"
    return None


def _from_download(folder: Path, name: str) -> tuple[str, str] | None:
    """Three lines: the revision, the etag, the time of the download; a file that is newer was changed by its owner."""
    lines = _lines(folder / DOWNLOADS / f"{name}.metadata")
    if len(lines) < 3:
        return None
    etag = lines[1].strip().strip('"')
    try:
        changed = (folder / name).stat().st_mtime - CLOCK_SLACK_S > float(lines[2])
    except (OSError, ValueError):
        return None
    return (etag, "its download") if SHA256.fullmatch(etag) and not changed else None


def _from_cache(path: Path) -> tuple[str, str] | None:
    """A snapshot's files are links to blobs, of which the large ones are named by their hash."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
        return blob.name, "Hugging Face's cache"
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []

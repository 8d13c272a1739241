"""Open a bundle folder and prove that it is whole.

Owns the checks between a folder on disk and a `Manifest`. Does not load any graph (see `backends`).
Nothing outside the folder is read: names are plain file names and links are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from edge.contract import MANIFEST_FILE, MAX_MANIFEST_BYTES, TOKENIZER_FILE, Manifest, manifest_from_json
from edge.errors import BundleError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_READ_BYTES = 1 << 20
_COPY_AGAIN = "Copy the bundle again, or export it again with `streamo-edge export`"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: where it is and what its manifest says."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.path / name


def open_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Open a bundle folder.

    Args:
      path: the folder that `streamo-edge export` wrote.
      verify: also compare every file's SHA-256 with the manifest (one read of the whole bundle); sizes are always
        compared.

    Raises:
      BundleError: not a bundle, another version, or a file that is missing, renamed, truncated or altered.
    """
    folder = Path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be opened: {_reason(error)}"
        raise BundleError(
            f"Bundle `{_shown(folder)}` {reason}", hint="Make one with `streamo-edge export CHECKPOINT -o BUNDLE`"
        ) from None
    if not is_folder:
        raise BundleError(f"Bundle `{folder}` should be a folder, found a file")
    manifest = manifest_from_json(_read_manifest(folder))
    _check_names(manifest)
    for name, facts in manifest.files.items():
        size_bytes = _regular_file_bytes(folder, name)
        if size_bytes != facts.bytes:
            raise BundleError(
                f"Bundle file `{name}` should have {facts.bytes} bytes, found {size_bytes}", hint=_COPY_AGAIN
            )
        if verify:
            _check_hash(folder, name, facts.sha256)
    return Bundle(folder, manifest)


def _read_manifest(folder: Path) -> object:
    if not os.path.lexists(folder / MANIFEST_FILE):
        raise BundleError(
            f"`{folder}` is not a bundle: it has no `{MANIFEST_FILE}`",
            hint="Make one with `streamo-edge export CHECKPOINT -o BUNDLE`",
        )
    size_bytes = _regular_file_bytes(folder, MANIFEST_FILE)
    if size_bytes > MAX_MANIFEST_BYTES:
        raise BundleError(f"`{MANIFEST_FILE}` should have at most {MAX_MANIFEST_BYTES} bytes, found {size_bytes}")
    try:
        return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"`{MANIFEST_FILE}` cannot be read: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"`{MANIFEST_FILE}` is not valid JSON: {error}", hint=_COPY_AGAIN) from None


def _check_names(manifest: Manifest) -> None:
    for name in manifest.files:
        if not _PLAIN_NAME.fullmatch(name):
            raise BundleError(f"`{MANIFEST_FILE}` names the file {name!r}; only plain names inside the bundle are read")
    needed = [TOKENIZER_FILE, manifest.embedding.file, manifest.vision.file, manifest.decoder.file]
    for part in (manifest.vision, manifest.decoder):
        needed += [name for name in (part.native_file, part.tensorrt_file) if name]
    needed += [manifest.stored_turns] if manifest.stored_turns else []
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"`{MANIFEST_FILE}` does not list the file `{name}` that it uses", hint=_COPY_AGAIN)
    table = manifest.embedding
    if table.dtype not in ("float32", "float16", "int8"):
        raise BundleError(f"The embedding table should be float32, float16 or int8, found {table.dtype!r}")
    if table.dtype == "int8" and (
        table.block_size < 1
        or table.columns % table.block_size
        or table.scales_offset % 4
        or table.scales_offset < table.rows * table.columns
    ):
        raise BundleError(
            f"The int8 embedding table of {table.rows} x {table.columns} cannot have blocks of {table.block_size} and "
            f"scales from byte {table.scales_offset} on"
        )
    expected_bytes = table.file_bytes
    if manifest.files[table.file].bytes != expected_bytes:
        raise BundleError(
            f"Embedding table `{table.file}` of {table.rows} x {table.columns} {table.dtype} should have "
            f"{expected_bytes} bytes, the manifest says {manifest.files[table.file].bytes}",
            hint=_COPY_AGAIN,
        )


def _regular_file_bytes(folder: Path, name: str) -> int:
    try:
        status = os.lstat(folder / name)
    except OSError:
        raise BundleError(f"Bundle file `{name}` is missing in `{folder}`", hint=_COPY_AGAIN) from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"Bundle file `{name}` should be an ordinary file, found a link or a folder")
    return status.st_size


def _check_hash(folder: Path, name: str, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with open(folder / name, "rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise BundleError(f"Bundle file `{name}` cannot be read: {_reason(error)}") from None
    if digest.hexdigest() != expected:
        raise BundleError(
            f"Bundle file `{name}` was altered: expected sha256 {expected[:12]}…, found {digest.hexdigest()[:12]}…",
            hint=_COPY_AGAIN,
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:117]}..."

"""A bundle folder that appears whole or not at all.

Owns the hashes and the rename; the folder that is written into until then is `partial`'s. Does not know what the files
mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from edge.contract import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileFacts, Manifest, manifest_to_json
from edge.errors import OutputError
from export.kept import Kept
from export.partial import PartialFolder, disk_free_bytes
from export.resume import Journal
from export.weight_store import WeightFile

SPARE_BYTES = 64 << 20
SCHEMAS = "streamo.bundle/"
"""How the schema of a bundle of any version begins."""


class BundleWriter:
    """Collects files in a sibling folder; `publish` gives it the bundle's name. Use as a context manager.

    An interruption leaves the folder where finished tensors are in it, any other failure removes it.

    Args:
      target: the bundle's folder. It must not exist, unless it is empty, or `overwrite` and it is a bundle that holds
        nothing but its own files.
      needed_bytes: what will be written, for the check of free space.
      key: of the inputs, see `resume`; what an export with the same key left behind is gone on with.

    Attributes:
      kept: what the next export with the same key need not work out again, beside the data files.

    Raises:
      OutputError: the folder cannot be created or must not be replaced, or the disk is too full.
    """

    def __init__(self, target: Path, needed_bytes: int, *, overwrite: bool = False, key: str | None = None) -> None:
        self.files: dict[str, FileFacts] = {}
        self._overwrite = overwrite
        self._key = key or str(os.getpid())
        try:
            self.target = Path(os.path.realpath(target))  # a link's own name must not be taken for the folder's
            if not self.target.name:
                raise OutputError(f"`{self.target}` cannot become a bundle", hint="Choose a folder that does not exist")
            self._check_target()
            self._check_space(needed_bytes)
        except (OSError, ValueError) as error:
            raise _cannot_write(Path(target), error) from None

    def __enter__(self) -> BundleWriter:
        try:
            self._partial = PartialFolder(self.target, self._key)
            self._partial.remove_abandoned()
            self.folder = self._partial.path
            self.kept = Kept(self.folder)
            self._journal = Journal(self.folder)
            self._journal.remove_others()
        except OSError as error:
            raise _cannot_write(self.target, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        self._partial.release(keep=interrupted and self._journal.bytes > 0)
        if isinstance(error, OSError):
            raise _cannot_write(self.target, error) from None

    def weight_file(self, name: str) -> WeightFile:
        """A data file, behind what an interrupted export finished of it."""
        return WeightFile(self.folder / name, self._journal)

    def add(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with (self.folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.record(name, FileFacts(len(content), hashlib.sha256(content).hexdigest()))

    def record(self, name: str, facts: FileFacts) -> None:
        """Take note of a file that was written into `folder` already."""
        self.files[name] = facts

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, the last file, and make the folder the bundle."""
        content = json.dumps(manifest_to_json(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with (self.folder / MANIFEST_FILE).open("w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._journal.remove()
        self.kept.remove()
        _sync_folder(self.folder)
        replaced = self.folder.with_name(self.folder.name + ".replaced")
        self._check_target()  # an export takes minutes; something may have been put there meanwhile
        existed = self.target.exists()
        if existed:
            os.rename(self.target, replaced)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if existed:
                os.rename(replaced, self.target)
            raise
        _sync_folder(self.target.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise OutputError(f"`{self.target}` is a file, expected a folder to create", hint="Choose another folder")
        empty = not any(self.target.iterdir())
        if empty:
            return
        own = _bundle_files(self.target)
        if own is None:
            raise OutputError(f"`{self.target}` exists and is not a bundle", hint="Choose a folder that does not exist")
        if not self._overwrite:
            raise OutputError(f"Bundle `{self.target}` exists", hint="Choose another folder, or add `--force`")
        with os.scandir(self.target) as entries:
            foreign = sorted(e.name for e in entries if e.name not in own or not e.is_file(follow_symlinks=False))
        if foreign:
            raise OutputError(
                f"Bundle `{self.target}` also holds `{foreign[0]}`, which is not one of its {len(own)} files",
                hint="Move it elsewhere, or choose another folder",
            )

    def _check_space(self, needed_bytes: int) -> None:
        free, needed = sum(disk_free_bytes(self.target)), needed_bytes + SPARE_BYTES
        if free < needed:
            raise OutputError(
                f"The bundle takes {needed / 1e6:.0f} MB, `{self.target.parent}` has {free / 1e6:.0f} MB free",
                hint="Free some space, choose another disk, or export with `--weights int4`",
            )


def _bundle_files(folder: Path) -> set[str] | None:
    """Names of the files that a bundle of any version consists of; None: the folder is no bundle."""
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            document = json.loads(file.read(MAX_MANIFEST_BYTES))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    schema, files = (document.get("schema"), document.get("files")) if isinstance(document, dict) else (None, None)
    if not isinstance(schema, str) or not schema.startswith(SCHEMAS) or not isinstance(files, dict):
        return None
    return {MANIFEST_FILE, *files}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(target: Path, error: OSError | ValueError) -> OutputError:
    reason, number = (error.strerror or error, error.errno) if isinstance(error, OSError) else (error, None)
    full = number == errno.ENOSPC
    return OutputError(
        f"Bundle `{target}` cannot be written: {reason}",
        hint="Free some space" if full else "Check the folder's permissions, or choose another one",
    )

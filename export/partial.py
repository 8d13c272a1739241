"""The folder that an export writes into until it is a bundle: made, locked, found again, cleared away.

Owns the folders beside a bundle that begin with a dot and its name, and the room there is for them. Does not know what
the files in them mean.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from pathlib import Path


class PartialFolder:
    """A folder beside `target`, held by this process. It is another's leftover if the key is the same.

    The lock is the kernel's, on the folder itself: it ends with the process, however that ends.

    Args:
      key: of the inputs; while another process works on the same ones, this one takes a folder of its own.
    """

    def __init__(self, target: Path, key: str) -> None:
        self._prefix = _prefix(target)
        self._parent = target.parent
        self.path = target.with_name(self._prefix + key)
        self._descriptor: int | None = None
        self._parent.mkdir(parents=True, exist_ok=True)
        self._take()
        if self._descriptor is None:
            self.path = target.with_name(f"{self._prefix}{key}-{os.getpid()}")
            self._take()
        if self._descriptor is None:
            raise FileExistsError(17, "another export in this process writes it")

    def remove_abandoned(self) -> None:
        """Remove what other exports to the same bundle left behind, unless they still run."""
        for leftover in self._parent.glob(f"{glob.escape(self._prefix)}*"):
            if leftover != self.path:
                descriptor = _lock(leftover)
                if descriptor is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    os.close(descriptor)

    def release(self, *, keep: bool) -> None:
        """Let go of the folder, and remove it unless it is to be kept. After it was renamed nothing is removed."""
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self) -> None:
        while True:
            self.path.mkdir(exist_ok=True)
            descriptor = _lock(self.path)
            if descriptor is None and self.path.exists():
                return
            if descriptor is not None and _is(self.path, descriptor):
                self._descriptor = descriptor
                return
            if descriptor is not None:  # removed by another process between the two calls
                os.close(descriptor)


def disk_free_bytes(target: Path) -> tuple[int, int]:
    """Free bytes where `target` will lie, and beside them its `left_behind_bytes`."""
    parent = Path(os.path.realpath(target)).parent
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free, left_behind_bytes(target)


def left_behind_bytes(target: Path) -> int:
    """Bytes in unfinished folders of `target` that no process holds: they are gone on with, or removed."""
    total, target = 0, Path(os.path.realpath(target))  # as `BundleWriter` takes it
    for folder in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        descriptor = _lock(folder)
        if descriptor is not None:
            total += sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file())
            os.close(descriptor)
    return total


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None: another holds it, or there is no folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: as if there were no other export
        pass
    return descriptor


def _is(folder: Path, descriptor: int) -> bool:
    try:
        found, held = folder.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

"""A text file that is readable at any moment, even after the process was killed between two writes.

Owns the writes and the messages of what went wrong with them. Does not know what the lines mean.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from edge.errors import OutputError

_HINTS = {
    errno.ENOENT: "Make its folder first: `mkdir -p {folder}`",
    errno.ENOTDIR: "Give a path whose folders are folders",
    errno.EISDIR: "Give the name of a file, not of a folder",
    errno.EACCES: "Give a path that this user may write to",
    errno.EPERM: "Give a path that this user may write to",
    errno.EROFS: "Give a path on a disk that is not read-only",
    errno.ENOSPC: "Free some space, or give a path on another disk",
    errno.EDQUOT: "Free some of your quota, or give a path on another disk",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`), or give another path",
}


def output_error(path: Path, error: OSError) -> OutputError:
    """`error` as an `OutputError` that says what to do about it."""
    hint = _HINTS.get(error.errno or 0, "Give another path").format(folder=path.parent)
    return OutputError(f"Output `{path}` cannot be written: {error.strerror or error}", hint=hint)


def check_writable(path: Path) -> bool:
    """Try to open `path` for writing, leaving its content alone; True when this made the file.

    Raises:
      OutputError: it cannot be written.
    """
    existed = path.exists()
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    except OSError as error:
        raise output_error(path, error) from error
    return not existed


class GrowingFile:
    """A file that only grows, one whole record a write; the only other change overwrites bytes by as many."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._size_bytes = 0

    @property
    def is_open(self) -> bool:
        return self._descriptor is not None

    def open(self, *, keep: bool) -> None:
        """Open for writing, behind what is there (`keep`) or in its place.

        Raises:
          OutputError: the file cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if keep else os.O_TRUNC)
        try:
            self._descriptor = os.open(self._path, flags, 0o644)
            self._size_bytes = os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise output_error(self._path, error) from error

    def ends_in_newline(self) -> bool:
        """False where an earlier process died in the middle of a line."""
        if self._descriptor is None or self._size_bytes == 0:
            return True
        return os.pread(self._descriptor, 1, self._size_bytes - 1) == b"\n"

    def append(self, record: bytes) -> int:
        """Write `record` behind everything else in one call; returns where it starts.

        A record that fits only in part (full disk) is taken back, so that the file stays readable.

        Raises:
          OutputError: it could not be written whole.
        """
        assert self._descriptor is not None, "append before open"
        start = self._size_bytes
        try:
            written = os.pwrite(self._descriptor, record, start)
            while written < len(record):  # a full disk takes a part first, and says why at the next try
                written += os.pwrite(self._descriptor, record[written:], start + written)
        except OSError as error:
            self._take_back(start)
            raise output_error(self._path, error) from error
        self._size_bytes += len(record)
        return start

    def overwrite(self, start: int, record: bytes) -> None:
        """Replace the bytes at `start` by as many others.

        Raises:
          OutputError: they could not be written.
        """
        assert self._descriptor is not None, "overwrite before open"
        try:
            os.pwrite(self._descriptor, record, start)
        except OSError as error:
            raise output_error(self._path, error) from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take_back(self, size_bytes: int) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, size_bytes)
        except OSError:
            return  # a device or pipe: there is nothing to take back

"""Output files: their place, claimed before there is anything to write, and text that is readable at any moment.

Owns the writes and the messages of what went wrong with them. Does not know what the lines mean. What was written is
readable even after the process was killed between two writes.
"""

from __future__ import annotations

import errno
import os
import stat
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


class FilePlace:
    """The place of one output file: claimed before the stream starts, given back if nothing comes of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made = False

    def claim(self) -> None:
        """Make sure that the file can be written, leaving its content alone; a second call does no harm.

        Raises:
          OutputError: it cannot, or is a pipe or socket, which would wait for a reader.
        """
        existed = self._path.exists()
        if existed and not _takes_writes_at_once(self._path.stat().st_mode):
            raise OutputError(
                f"Output `{self._path}` should be a regular file, found a pipe or another special file",
                hint="Write a file, and follow it with `tail -f`",
            )
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        except OSError as error:
            raise output_error(self._path, error) from error
        self._made = self._made or not existed

    def give_back(self) -> None:
        """Remove the file if claiming made it and it is still empty."""
        try:
            if self._made and self._path.is_file() and self._path.stat().st_size == 0:
                self._path.unlink()
        except OSError:
            return  # its folder is no longer ours to change
        self._made = False


def _takes_writes_at_once(mode: int) -> bool:
    # Folders are left to `open`, which says so; devices like /dev/null never wait.
    return stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISDIR(mode)


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

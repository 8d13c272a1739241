"""Standard output that remembers why it could not be written, even where a library swallowed the error.

Owns the answer to "did the data arrive?". Does not know what is written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from edge.errors import OutputError


class WatchedStdout:
    """Passes everything on to `stream`; `problem` is the first error of a write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self.problem = self.problem or error
            raise

    def flush(self) -> None:
        """See `io.IOBase.flush`."""
        try:
            self._stream.flush()
        except OSError as error:
            self.problem = self.problem or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def finish(self) -> BrokenPipeError | OutputError | None:
        """Write what is still to be written; returns what has been wrong at any time."""
        with suppress(OSError, ValueError):  # ValueError: closed by the command
            self.flush()
        if self.problem is None:
            return None
        with suppress(OSError, ValueError):  # keeps the interpreter from complaining about it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if isinstance(self.problem, BrokenPipeError):
            return self.problem
        reason = self.problem.strerror or str(self.problem)
        return OutputError(f"Standard output cannot be written: {reason}", hint="Check where it is redirected to")


@contextmanager
def watched_stdout() -> Iterator[WatchedStdout | None]:
    """Put a `WatchedStdout` in the place of `sys.stdout`; None where there is none."""
    real = sys.stdout
    if real is None:
        yield None
        return
    watched = WatchedStdout(real)
    sys.stdout = watched  # type: ignore[assignment]
    try:
        yield watched
    finally:
        sys.stdout = real

"""Events as JSON lines, for programs. Appends to what an earlier run left; each session has its own id."""

from __future__ import annotations

from pathlib import Path

from edge.events import Event
from edge.sinks.files import FilePlace, GrowingFile


class JsonlSink:
    """One event a line, one write a line: a reader following the file sees whole lines only."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._place = FilePlace(path)
        self._file = GrowingFile(path)

    def open(self) -> None:
        """See `Sink.open`."""
        self._place.claim()

    def handle(self, event: Event) -> None:
        """See `Sink.handle`."""
        line = event.to_line().encode("utf-8", "backslashreplace") + b"\n"
        if not self._file.is_open:
            self._file.open(keep=True)
            line = line if self._file.ends_in_newline() else b"\n" + line
        self._file.append(line)

    def close(self) -> None:
        """See `Sink.close`."""
        self._file.close()
        self._place.give_back()

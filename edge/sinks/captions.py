"""Captions in a file that grows cue by cue and can be played at any moment.

Owns when a cue starts and ends. The two caption formats differ only in a header and in how a cue is spelt.

A cue is written with its full reading time as soon as the reply is complete; when the next reply comes sooner, the
twelve or so characters of its end are overwritten in place. So nothing is kept in memory and nothing is rewritten.
"""

from __future__ import annotations

from pathlib import Path

from edge.events import RESPONSE_COMPLETED, SOURCE_STATE, Event
from edge.sinks.files import FilePlace, GrowingFile
from edge.sinks.plain import one_line

MIN_CUE_S = 1.5
MAX_CUE_S = 6.0
_READING_CHARACTERS_PER_S = 15.0


def reading_time_s(text: str) -> float:
    """How long `text` stays, unless another reply follows sooner."""
    return min(MAX_CUE_S, MIN_CUE_S + len(text) / _READING_CHARACTERS_PER_S)


class CaptionSink:
    """Replies as cues; the two formats fill in `header`, `decimal_mark` and `cue`."""

    header = b""
    decimal_mark = "."

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._place = FilePlace(path)
        self._file = GrowingFile(path)
        self._started = False
        self._cues = 0
        self._end_ms = 0  # of the last cue, and where in the file it stands
        self._end_at_bytes = 0

    def open(self) -> None:
        """See `Sink.open`."""
        if not self._started:
            self._place.claim()

    def handle(self, event: Event) -> None:
        """See `Sink.handle`. A caption file of an earlier run is replaced once the source gives its first picture."""
        if event.type == SOURCE_STATE and event.fields.get("state") == "live" and not self._started:
            self._started = True
            self._file.open(keep=False)
            if self.header:
                self._file.append(self.header)
        elif event.type == RESPONSE_COMPLETED and self._started and event.fields["text"].strip():
            self._add(one_line(event.fields["text"]), event.fields["media_time"]["start_s"])

    def close(self) -> None:
        """See `Sink.close`. A stream without replies leaves a file without cues, one that never started leaves none."""
        self._file.close()
        if not self._started:
            self._place.give_back()

    def cue(self, number: int, times: str, text: str) -> tuple[str, str]:
        """One cue, as what comes up to and with its times, and what follows."""
        raise NotImplementedError

    def _add(self, text: str, start_s: float) -> None:
        start_ms = round(start_s * 1e3)
        if self._cues and start_ms < self._end_ms:
            self._shorten_last(start_ms)
        end_ms = start_ms + round(reading_time_s(text) * 1e3)
        times = f"{self._time(start_ms)} --> {self._time(end_ms)}"
        head, tail = self.cue(self._cues + 1, times, text)
        head_bytes = head.encode()
        at_bytes = self._file.append(head_bytes + tail.encode("utf-8", "backslashreplace"))
        self._cues += 1
        self._end_ms = end_ms
        self._end_at_bytes = at_bytes + len(head_bytes) - len(self._time(end_ms))

    def _shorten_last(self, end_ms: int) -> None:
        width = len(self._time(self._end_ms))
        self._file.overwrite(self._end_at_bytes, self._time(end_ms).rjust(width, "0").encode())

    def _time(self, time_ms: int) -> str:
        seconds, milliseconds = divmod(time_ms, 1000)
        hours, seconds = divmod(seconds, 3600)
        return f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}{self.decimal_mark}{milliseconds:03d}"

"""What the model says, for people: `[00:05:10] A red ball enters from the left.`

On a terminal the words appear as the model says them; elsewhere whole lines do.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from edge.errors import OutputError
from edge.events import QUESTION_ASKED, RESPONSE_COMPLETED, RESPONSE_CREATED, RESPONSE_DELTA, Event
from edge.sinks.plain import one_line, one_line_piece, stream_time

_DIM, _BOLD_BLUE, _PLAIN = "\x1b[2m", "\x1b[1;34m", "\x1b[0m"


class TextSink:
    """Replies and questions as lines of text; everything else is for other sinks."""

    name = "standard output"

    def __init__(
        self, stream: TextIO | None = None, *, as_spoken: bool | None = None, colour: bool | None = None
    ) -> None:
        """`as_spoken` prints word by word, `colour` marks times and questions; both by default on terminals only."""
        chosen = stream if stream is not None else sys.stdout
        if chosen is None:
            raise OutputError(
                "There is no standard output to write to", hint="Give an output file: `--output talk.vtt`"
            )
        self._stream: TextIO = chosen
        terminal = chosen.isatty()
        self._as_spoken = terminal if as_spoken is None else as_spoken
        self._colour = terminal and "NO_COLOR" not in os.environ if colour is None else colour
        self._speaking = self._said = False

    def open(self) -> None:
        """See `Sink.open`."""

    def handle(self, event: Event) -> None:
        """See `Sink.handle`."""
        if event.type == QUESTION_ASKED:
            self._write(f"{self._head(event)}{self._paint(_BOLD_BLUE, '? ' + one_line(event.fields['text']))}\n")
        elif event.type == RESPONSE_CREATED and self._as_spoken:
            self._speaking, self._said = True, False
            self._write(self._head(event))
        elif event.type == RESPONSE_DELTA and self._speaking:
            piece = one_line_piece(event.fields["text"])
            piece = piece if self._said else piece.lstrip()
            if piece:
                self._said = True
                self._write(piece)
        elif event.type == RESPONSE_COMPLETED:
            said = "" if self._speaking else f"{self._head(event)}{one_line(event.fields['text'])}"
            self._speaking = False
            self._write(f"{said}{' ...' if event.fields.get('truncated') else ''}\n")

    def close(self) -> None:
        """See `Sink.close`; ends a line that was being said."""
        if self._speaking:
            self._speaking = False
            self._write("\n")

    def _head(self, event: Event) -> str:
        return self._paint(_DIM, f"[{stream_time(event.fields['media_time']['start_s'])}]") + " "

    def _paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if self._colour else text

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputError("Standard output was closed by the program that reads it") from error
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            raise OutputError(
                f"Standard output cannot be written: {error}", hint="Check where it is redirected to"
            ) from error

"""Outputs of a stream. Owns which file name means which output; each kind lives in its own module."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from edge.errors import OutputError, UsageError
from edge.sinks.base import Sink

__all__ = ["Sink", "open_sinks"]

_KINDS = ".jsonl (events), .vtt or .srt (captions), .mp4 (captioned video), `-` (text)"


def open_sinks(outputs: Sequence[str]) -> list[Sink]:
    """The sinks that `outputs` name, checked to be writable; none means text on standard output.

    Raises:
      UsageError: a suffix that names no kind of output, or the same file twice.
      OutputError: a file that cannot be written.
    """
    paths = [Path(text).expanduser() for text in outputs if text != "-"]
    repeated = {str(path) for path in paths if paths.count(path) > 1}
    if repeated:
        raise UsageError(f"Output `{min(repeated)}` is given twice", hint="Give each output its own file")
    sinks = [_make(text) for text in dict.fromkeys(outputs)] or [_make("-")]
    opened: list[Sink] = []
    try:
        for sink in sinks:
            sink.open()
            opened.append(sink)
    except OutputError:
        for sink in opened:
            sink.close()
        raise
    return sinks


def _make(text: str) -> Sink:
    if text == "-":
        from edge.sinks.text import TextSink

        return TextSink()
    path = Path(text).expanduser()
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        from edge.sinks.jsonl import JsonlSink

        return JsonlSink(path)
    if suffix == ".vtt":
        from edge.sinks.vtt import VttSink

        return VttSink(path)
    if suffix == ".srt":
        from edge.sinks.srt import SrtSink

        return SrtSink(path)
    if suffix == ".mp4":
        from edge.sinks.video import VideoSink

        return VideoSink(path)
    near = difflib.get_close_matches(suffix, [".jsonl", ".vtt", ".srt", ".mp4"], n=1) if suffix else []
    hint = f"Did you mean `{path.with_suffix(near[0])}`?" if near else f"End its name in {_KINDS}"
    found = f"`{suffix}`" if suffix else "no suffix"
    raise UsageError(f"Output `{text}` should end in .jsonl, .vtt, .srt or .mp4, found {found}", hint=hint)

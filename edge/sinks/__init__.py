"""Outputs of a stream. Owns which file name means which output; each kind lives in its own module."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from edge.errors import OutputError, UsageError
from edge.sinks.base import Sink

__all__ = ["Sink", "open_sinks"]

_KINDS = ".jsonl (events), .vtt or .srt (captions), .mp4 (captioned video), `-` (text)"


def open_sinks(outputs: Sequence[str], *, source: str = "") -> list[Sink]:
    """The sinks that `outputs` name, checked to be writable; none means text on standard output.

    Args:
      outputs: file names, `-` for text.
      source: what the stream is read from; no output may replace it.

    Raises:
      UsageError: a suffix that names no kind of output, the same file twice, or the source itself.
      OutputError: a file that cannot be written.
    """
    seen: set[object] = set()
    recording = _identity(source) if source else None
    for text in outputs:
        identity = _identity(text) if text != "-" else None
        if identity is None:
            continue
        if identity == recording:
            raise UsageError(f"Output `{text}` is the source, which it would replace", hint="Give it another name")
        if identity in seen:
            raise UsageError(f"Output `{text}` is given twice", hint="Give each output its own file")
        seen.add(identity)
    sinks = [_make(text) for text in dict.fromkeys(outputs)] or [_make("-")]
    try:
        for sink in sinks:
            sink.open()
    except OutputError:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def _identity(text: str) -> object:
    """Equal for two names of one file, whatever links and dots are in them; None for what can be no file."""
    path = Path(text).expanduser()
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return path.resolve()
    except (OSError, ValueError):
        return None
    return facts.st_dev, facts.st_ino


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

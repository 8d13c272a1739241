"""Captions as SubRip, which players and editors read."""

from __future__ import annotations

from edge.sinks.captions import CaptionSink


class SrtSink(CaptionSink):
    """One numbered cue a reply."""

    decimal_mark = ","

    def cue(self, number: int, times: str, text: str) -> tuple[str, str]:
        """See `CaptionSink.cue`."""
        return f"{number}\n{times}", f"\n{text.replace('-->', '->')}\n\n"

"""Captions as WebVTT, which browsers play."""

from __future__ import annotations

from edge.sinks.captions import CaptionSink


class VttSink(CaptionSink):
    """One cue a reply."""

    header = b"WEBVTT\n\n"

    def cue(self, number: int, times: str, text: str) -> tuple[str, str]:
        """See `CaptionSink.cue`."""
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return times, f"\n{escaped}\n\n"

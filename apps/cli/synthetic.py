"""The demonstration's world as a video source: `synthetic:table?seed=7&seconds=60`.

Owns the adapter between a generated stream and `edge.sources`. Same seed, same pictures, on any machine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from apps.cli.parsing import closest
from edge.errors import UsageError
from edge.frames import Frame
from edge.sources.base import SourceInfo

if TYPE_CHECKING:
    from apps.demo.world import Stream

SCENES = ("table",)
DEFAULTS = {"seed": 7, "seconds": 60, "fps": 10}
LEAST = {"seed": 0, "seconds": 2, "fps": 1}
MOST = {"seed": 2**63, "seconds": 24 * 3600, "fps": 60}
_EXAMPLE = "For example `synthetic:table?seed=7&seconds=60`, in quotes"


class SyntheticSource:
    """Plays a generated stream at `fps` pictures a second; picture n is of stream time n / fps."""

    live = False

    def __init__(self, stream: Stream, *, name: str, fps: int = 10) -> None:
        self.name = name
        self._stream = stream
        self._fps = fps
        self._index = 0

    def open(self) -> SourceInfo:
        """See `Source.open`."""
        self._index = 0
        return SourceInfo(self._stream.width, self._stream.height, float(self._fps), float(self._stream.duration_s))

    def read(self) -> Frame | None:
        """See `Source.read`."""
        media_time_s = self._index / self._fps
        if media_time_s >= self._stream.duration_s:
            return None
        self._index += 1
        return Frame(self._stream.render(media_time_s), media_time_s)

    def skip_to(self, media_time_s: float) -> int:
        """See `Source`."""
        skipped = max(0, math.floor(media_time_s * self._fps + 1e-6) - self._index)
        self._index += skipped
        return skipped

    def close(self) -> None:
        """See `Source.close`."""


def synthetic_source(scene: str, options: dict[str, str]) -> SyntheticSource:
    """The source of `synthetic:<scene>?<options>`.

    Raises:
      UsageError: an unknown scene or option, or a value that is no whole number within its limits.
    """
    if scene not in SCENES:
        meant = closest(scene, SCENES)
        raise UsageError(
            f"There is no synthetic scene `{scene}`; scenes are {', '.join(SCENES)}",
            hint=f"Did you mean `{meant}`?" if meant else _EXAMPLE,
        )
    values = {**DEFAULTS, **{name: _value(name, text) for name, text in options.items()}}
    from apps.demo.phrases import EVENT
    from apps.demo.world import make_stream

    stream = make_stream(values["seed"], EVENT, duration_s=values["seconds"])
    name = f"synthetic:{scene}?seed={values['seed']}&seconds={values['seconds']}"
    return SyntheticSource(stream, name=name, fps=values["fps"])


def _value(name: str, text: str) -> int:
    if name not in DEFAULTS:
        meant = closest(name, DEFAULTS)
        raise UsageError(
            f"Synthetic scenes have no option `{name}`; options are {', '.join(DEFAULTS)}",
            hint=f"Did you mean `{meant}`?" if meant else _EXAMPLE,
        )
    if not text.isdecimal() or not LEAST[name] <= int(text) <= MOST[name]:
        raise UsageError(
            f"Option `{name}` of a synthetic scene should be a whole number from {LEAST[name]} to {MOST[name]}, "
            f"found {text!r}",
            hint=_EXAMPLE,
        )
    return int(text)

"""Clips of the demonstration's world for an export that is given no videos of its own.

Owns which streams those are. No other figure of the project is measured on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apps.demo.world import make_stream

if TYPE_CHECKING:
    from export.turns import Clip

CALIBRATED = range(40000, 40005)
HELD_OUT = range(40010, 40015)
"""Tasks take turns with the seed: each is there once in both."""


def demo_clips() -> list[Clip]:
    """Five streams to calibrate on and five that are held out."""
    from export.turns import Clip

    clips = []
    for seeds, held_out in ((CALIBRATED, False), (HELD_OUT, True)):
        for seed in seeds:
            stream = make_stream(seed)
            frames = [stream.render(t) for t in range(stream.duration_s)]
            clips.append(Clip(f"demonstration {seed}", frames, stream.questions, held_out))
    return clips

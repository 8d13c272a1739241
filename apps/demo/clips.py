"""Clips of the demonstration's world for an export that is given no videos of its own.

Owns which streams those are. No other figure of the project is measured on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from apps.demo.world import make_stream
from edge.preprocess import PreprocessConfig, resize_frame

if TYPE_CHECKING:
    from export.turns import Clip

CALIBRATED = range(40000, 40005)
HELD_OUT = range(40010, 40015)
"""Tasks take turns with the seed: each is there once in both."""
JUDGED = (40010, 40012)
"""Of those held out: what an export that calibrates on nothing is judged by."""
JUDGED_TURNS = 20
"""Of each, so that a model that babbles is done in seconds too."""
JUDGED_PIXELS = PreprocessConfig(max_pixels=84 * 140)
"""Their size, which is what the shipped model sees of any; with 15 visual tokens a turn of a large model is cheap."""


def demo_clips() -> list[Clip]:
    """Five streams to calibrate on and five that are held out."""
    return [_clip(seed, held_out=False) for seed in CALIBRATED] + [_clip(seed, held_out=True) for seed in HELD_OUT]


def judged_clips(seeds: Sequence[int] = JUDGED, most_turns: int = JUDGED_TURNS) -> list[Clip]:
    """Short streams of small pictures that are only held out; of each, the first turns."""
    clips = [_clip(seed, held_out=True, most_turns=most_turns) for seed in seeds]
    return [replace(clip, frames=[resize_frame(frame, JUDGED_PIXELS) for frame in clip.frames]) for clip in clips]


def _clip(seed: int, *, held_out: bool, most_turns: int | None = None) -> Clip:
    from export.turns import Clip

    stream = make_stream(seed)
    frames = [stream.render(t) for t in range(stream.duration_s)[:most_turns]]
    return Clip(f"demonstration {seed}", frames, stream.questions, held_out)

"""`--calibration`, `--held-out` and `--questions`: the user's videos and questions as clips of an export.

Owns how a video becomes one frame a turn, and which question is asked of which clip when.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apps.cli.synthetic import synthetic_source
from edge.clock import SystemClock
from edge.errors import SourceError, UsageError
from edge.pacing import FramePacer, TurnSchedule, horizon_before
from edge.sources import Source, open_source

if TYPE_CHECKING:
    import numpy as np

    from export.turns import Clip

MOST_TURNS = 60
"""Of each clip; what follows is not read."""
LONGEST_SIDE = 1280
"""Pixels; larger frames are held smaller, since the model sees far fewer anyway."""
DEFAULT_QUESTIONS = ("Describe each event when it ends.",)
_TIMED = re.compile(r"(\d+)\s*:\s*(.+)")

Question = tuple[int | None, str]
"""The second at which it is asked, or None, and its text."""


def read_clips(sources: Sequence[str], questions: Sequence[Question], *, held_out: bool | None = None) -> list[Clip]:
    """The first minute of each source, with its questions.

    Args:
      sources: video files, folders of pictures or `synthetic:`, as `run --source` takes them.
      questions: those with a second are asked of every clip. The others are dealt to the clips in turn, and spread
        evenly over each.
      held_out: see `Clip`.

    Raises:
      SourceError: a source does not open.
      UsageError: a source is live.
    """
    from export.turns import Clip

    clips = []
    untimed = [text for second, text in questions if second is None]
    for i, text in enumerate(sources):
        frames = _frames(text)
        own = untimed[i % len(untimed) :: len(sources)] if untimed else []
        spread = [(len(frames) * k // len(own), question) for k, question in enumerate(own)]
        asked: dict[int, str] = {}
        for second, question in [*spread, *((at, text) for at, text in questions if at is not None)]:
            if second < len(frames):
                asked[second] = f"{asked[second]}\n{question}" if second in asked else question
        clips.append(Clip(Path(text).name, frames, asked, held_out))
    return clips


def read_questions(path: str | None) -> list[Question]:
    """Questions from a text file, one a line: `text`, or `SECONDS: text`.

    Raises:
      UsageError: it cannot be read or holds no question.
    """
    if path is None:
        return [(None, text) for text in DEFAULT_QUESTIONS]
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"Questions `{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found: list[Question] = []
    for line in filter(None, lines):
        timed = _TIMED.fullmatch(line)
        found.append((int(timed[1]), timed[2]) if timed else (None, line))
    if not found:
        raise UsageError(f"Questions `{path}` hold no line", hint="Write one question a line, or `SECONDS: question`")
    return found


def _frames(text: str) -> list[np.ndarray]:
    """One frame a turn."""
    source = open_source(text, clock=SystemClock(), synthetic=synthetic_source)
    if source.live:
        raise UsageError(f"`{text}` is a live source; expected a video file", hint="Record a clip first")
    source.open()
    try:
        frames = _paced(source)
    finally:
        source.close()
    if not frames:
        raise SourceError(f"`{text}` holds no frame of a whole second")
    return frames


def _paced(source: Source) -> list[np.ndarray]:
    """The frame of each turn, by the rule of every run."""
    pacer = FramePacer(TurnSchedule(1))
    frames: list[np.ndarray] = []
    while len(frames) < MOST_TURNS:
        frame = source.read()
        known_s = horizon_before(frame) if frame is not None else pacer.newest_media_time_s or 0.0
        while (due := pacer.oldest_due(known_s)) is not None and len(frames) < MOST_TURNS:
            frames.append(_reduced(due.frame.pixels))
        if frame is None:
            break
        pacer.offer(frame)
    return frames


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """The frame with at most `LONGEST_SIDE` pixels a side."""
    longest = max(pixels.shape[:2])
    if longest <= LONGEST_SIDE:
        return pixels.copy()
    import cv2

    height, width = (max(1, round(side * LONGEST_SIDE / longest)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)

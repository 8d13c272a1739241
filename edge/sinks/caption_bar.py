"""The bar below the picture of a captioned video, drawn with Pillow.

Owns its look: state, stream time, the last question, the last reply and a strip of the last minute. Does not know
events or video files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.errors import OutputError
from edge.sinks.plain import one_line, stream_time

Colour = tuple[int, int, int]

BACKGROUND: Colour = (17, 20, 26)
_RULE: Colour = (44, 50, 60)
_BRIGHT: Colour = (240, 243, 248)
_FADED: Colour = (132, 141, 155)
_QUESTION: Colour = (126, 182, 255)
STATE_COLOURS: dict[str, Colour] = {"silence": (92, 102, 117), "standby": (245, 184, 61), "response": (61, 220, 132)}
_STATE_WORDS = {"silence": "silent", "standby": "something is going on", "response": "speaking"}

STRIP_S = 60
_QUESTION_LINES = 2
_REPLY_LINES = 3


@dataclass(frozen=True)
class BarContent:
    """What the bar shows; `strip` holds the states of the last seconds, oldest first, "" where there was none."""

    time_s: int = 0
    state: str = ""
    question: str = ""
    reply: str = ""
    reply_fades: bool = False
    strip: tuple[str, ...] = ()


class CaptionBar:
    """Draws the bar at one width; what did not change since the last call is not drawn again."""

    def __init__(self, width: int) -> None:
        self._image, self._draw, self._font_of = _pillow()
        scale = min(1.4, max(0.85, width / 640))
        self._width = width
        self._margin = round(16 * scale)
        self._small, self._medium, self._large = (round(size * scale) for size in (14, 17, 23))
        self._line_height = round(self._large * 1.25)
        self._question_top = self._margin + round(self._small * 1.9)
        self._question_line_height = round(self._medium * 1.3)
        self._reply_gap = round(self._medium * 0.4)
        strip_height = round(8 * scale)
        words_height = _QUESTION_LINES * self._question_line_height + self._reply_gap + _REPLY_LINES * self._line_height
        self._strip_top = self._question_top + words_height + round(8 * scale)
        self.height = _even(self._strip_top + strip_height)
        self._drawn: tuple[BarContent, np.ndarray] | None = None

    def render(self, content: BarContent) -> np.ndarray:
        """The bar as (height, width, 3) uint8 RGB; not to be written to."""
        if self._drawn is None or self._drawn[0] != content:
            canvas = self._image.new("RGB", (self._width, self.height), BACKGROUND)
            pen = self._draw.Draw(canvas)
            self._draw_state(pen, canvas, content)
            self._draw_words(pen, content)
            self._draw_strip(pen, content.strip)
            self._drawn = (content, np.asarray(canvas))
        return self._drawn[1]

    def _draw_state(self, pen: Any, canvas: Any, content: BarContent) -> None:
        font, left, top = self._font_of(self._small), self._margin, self._margin - 2
        radius = self._small // 2 - 1
        middle = top + self._small // 2 + 2
        colour = STATE_COLOURS.get(content.state, _RULE)
        canvas.paste(colour, (left, middle - radius), self._disc(2 * radius))
        words = _STATE_WORDS.get(content.state, "waiting for a question")
        pen.text((left + 2 * radius + 9, top), words, font=font, fill=_FADED if content.state != "response" else colour)
        pen.text((self._width - self._margin, top), stream_time(content.time_s), font=font, fill=_FADED, anchor="ra")

    def _disc(self, size: int) -> Any:
        """A round mask with smooth edges: Pillow draws jagged ones, so draw large and shrink."""
        large = self._image.new("L", (8 * size, 8 * size), 0)
        self._draw.Draw(large).ellipse((0, 0, 8 * size - 1, 8 * size - 1), fill=255)
        return large.resize((size, size), self._image.Resampling.LANCZOS)

    def _draw_words(self, pen: Any, content: BarContent) -> None:
        room = self._width - 2 * self._margin
        question_font, reply_font = self._font_of(self._medium), self._font_of(self._large)
        question = wrap(one_line(content.question), question_font.getlength, room, lines=_QUESTION_LINES)
        top = self._question_top
        for line in question:
            pen.text((self._margin, top), line, font=question_font, fill=_QUESTION)
            top += self._question_line_height
        top += self._reply_gap
        colour = _FADED if content.reply_fades else _BRIGHT
        for line in wrap(one_line(content.reply), reply_font.getlength, room, lines=_REPLY_LINES):
            pen.text((self._margin, top), line, font=reply_font, fill=colour)
            top += self._line_height

    def _draw_strip(self, pen: Any, strip: tuple[str, ...]) -> None:
        pen.rectangle((0, self._strip_top, self._width, self.height), fill=(26, 30, 38))
        step = self._width / STRIP_S
        first = STRIP_S - len(strip)
        for number, state in enumerate(strip):
            if state in STATE_COLOURS:
                left = round((first + number) * step)
                right = max(left, round((first + number + 1) * step) - 2)
                colour = STATE_COLOURS[state] if state != "silence" else _RULE
                pen.rectangle((left, self._strip_top, right, self.height), fill=colour)


def wrap(text: str, width_of: Any, room: float, *, lines: int) -> list[str]:
    """Break `text` between words into at most `lines` lines no wider than `room`; what is left out becomes `...`.

    The end of a text is kept and its start left out: while words arrive, the newest ones are what people read.
    A word wider than the room is broken anywhere.
    """
    broken: list[str] = []
    line = ""
    for word in text.split():
        trial = f"{line} {word}" if line else word
        if width_of(trial) <= room:
            line = trial
            continue
        if line:
            broken.append(line)
        while word and width_of(word) > room:
            fits = max(1, next((n for n in range(len(word) - 1, 0, -1) if width_of(word[:n]) <= room), 1))
            broken.append(word[:fits])
            word = word[fits:]
        line = word
    if line:
        broken.append(line)
    if len(broken) <= lines:
        return broken
    first, *others = broken[-lines:]
    while first and width_of(f"...{first}") > room:
        first = first[1:]
    return [f"...{first}", *others]


def _even(number: int) -> int:
    return number + number % 2


def _pillow() -> tuple[Any, Any, Any]:
    """Pillow's `Image` and `ImageDraw` modules, and a font by size."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise OutputError(
            "A captioned video needs Pillow, which is not installed",
            hint="Install it with `pip install 'pillow>=10.1'`",
        ) from error
    fonts: dict[int, Any] = {}

    def font_of(size: int) -> Any:
        if size not in fonts:
            try:
                fonts[size] = ImageFont.load_default(size)
            except TypeError:  # before Pillow 10.1: one small bitmap font
                fonts[size] = ImageFont.load_default()
        return fonts[size]

    return Image, ImageDraw, font_of

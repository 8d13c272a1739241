"""Draws a scene at any time: table, objects, cups, hands, light and camera noise.

Owns every pixel of the demonstration world. Knows nothing of questions or tokens. Coordinates are those of the native
560 x 336 picture; another `scale` draws the same scene at another size.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

from apps.demo.phrases import OBJECTS
from apps.demo.script import SLOT_COUNT, Script, TableState, WorldEvent

WIDTH, HEIGHT = 560, 336
APPROACH_S = 0.25  # a hand comes into view this long before its event starts, and leaves this long after its end
TOP, BOTTOM, LEFT, RIGHT = "top", "bottom", "left", "right"
SIDE_OF_KIND = {
    "put": TOP, "cover": TOP, "take": BOTTOM, "uncover": BOTTOM, "move_right": LEFT, "move_left": RIGHT,
}  # fmt: skip
_FIXED_POINT_BITS = 4
_RGB = {"red": (212, 40, 44), "green": (38, 158, 66), "blue": (44, 84, 214), "yellow": (240, 204, 44)}
_SKIN = ((236, 188, 160), (214, 160, 126), (168, 116, 84), (120, 80, 60))
_SLEEVE = ((70, 70, 78), (228, 226, 222), (120, 92, 140), (104, 84, 66), (150, 150, 156))
_CUP = ((238, 236, 230), (96, 88, 98), (176, 148, 178), (150, 122, 100))
_DARK = 0.4


@lru_cache(maxsize=4)
def _noise_tile(height: int, width: int) -> np.ndarray:
    """Unit-variance camera noise times 16, int16, larger than the picture so that it can be shifted."""
    rng = np.random.Generator(np.random.PCG64(2024))
    return np.round(rng.standard_normal((height + 64, width + 64, 3)) * 16).astype(np.int16)


@lru_cache(maxsize=4)
def _scaled_noise(height: int, width: int, level: int) -> np.ndarray:
    return np.round(_noise_tile(height, width) * (level / 64)).astype(np.int16)


def add_noise(picture: np.ndarray, level: float, dy: int, dx: int) -> np.ndarray:
    """Put camera noise on a picture; `level` in quarters of a grey level, shifts `dy`, `dx` under 64 choose it."""
    height, width = picture.shape[:2]
    noise = _scaled_noise(height, width, max(1, round(level)))
    return cv2.add(picture, noise[dy : dy + height, dx : dx + width], dtype=cv2.CV_8U)


class Look:
    """How one scene looks: colours, sizes, places, noise. Drawn from `rng` in a fixed order."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.slot_x = [70 + 140 * slot + float(rng.uniform(-14, 14)) for slot in range(SLOT_COUNT)]
        self.slot_y = [184 + float(rng.uniform(-14, 14)) for _ in range(SLOT_COUNT)]
        self.radius = [float(rng.uniform(40, 51)) for _ in OBJECTS]
        self.tone = [tuple(rng.uniform(-16, 16, 3).tolist()) for _ in OBJECTS]
        self.skin = _SKIN[int(rng.integers(len(_SKIN)))]
        self.sleeve = _SLEEVE[int(rng.integers(len(_SLEEVE)))]
        self.cup = _CUP[int(rng.integers(len(_CUP)))]
        self.horizon = float(rng.uniform(84, 132))
        self.wall = self._muted(rng, 128, 214)
        self.table = self._muted(rng, 120, 206)
        self.stripes = float(rng.uniform(0, 9))
        self.stripe_width = float(rng.uniform(6, 40))
        self.mottle = float(rng.uniform(0, 9))
        self.texture_seed = int(rng.integers(2**31))
        self.dark = float(rng.uniform(_DARK - 0.04, _DARK + 0.04))
        self.noise_level = int(rng.integers(4, 25))  # quarters of a grey level, standard deviation 1 to 6

    @staticmethod
    def _muted(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
        return np.clip(rng.uniform(low, high) + rng.uniform(-22, 22, 3), 100, 235)

    def background(self, width: int, height: int) -> np.ndarray:
        """The empty room: wall above, table below. (height, width, 3) uint8."""
        rng = np.random.Generator(np.random.PCG64(self.texture_seed))
        scale = height / HEIGHT
        picture = np.empty((height, width, 3), np.float32)
        horizon = round(self.horizon * scale)
        picture[:horizon], picture[horizon:] = self.wall, self.table
        rows = np.linspace(1.05, 0.95, height - horizon, dtype=np.float32)[:, None, None]
        wave = np.sin(np.arange(width, dtype=np.float32) / (self.stripe_width * scale))[None, :, None]
        picture[horizon:] = picture[horizon:] * rows + wave * self.stripes
        coarse = rng.standard_normal((9, 15)).astype(np.float32)
        picture += self.mottle * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[:, :, None]
        picture[max(horizon - 2, 0) : horizon + 1] *= 0.86
        return np.clip(picture, 0, 255).astype(np.uint8)


class Painter:
    """Draws single things on a picture at one scale; coordinates are native."""

    def __init__(self, look: Look, scale: float) -> None:
        self.look, self.scale = look, scale
        self._unit = scale * (1 << _FIXED_POINT_BITS)
        self.drawn: list[tuple[str, int, float, float]] = []  # ("thing" | "cup" | side, object or -1, x, y)

    def _at(self, x: float, y: float) -> tuple[int, int]:
        # Pixel centres: a point of the native picture falls on the same place at every scale.
        half = (1 << _FIXED_POINT_BITS) / 2
        return round(x * self._unit - half), round(y * self._unit - half)

    def _polygon(self, picture: np.ndarray, points: list[tuple[float, float]], colour, edge) -> None:
        corners = np.array([self._at(x, y) for x, y in points], np.int32)
        cv2.fillPoly(picture, [corners], colour, cv2.LINE_AA, _FIXED_POINT_BITS)
        thickness = max(1, round(3 * self.scale))
        cv2.polylines(picture, [corners], True, edge, thickness, cv2.LINE_AA, _FIXED_POINT_BITS)

    def shadow(self, picture: np.ndarray, x: float, y: float, radius: float) -> None:
        """A soft dark patch under something that stands at (x, y)."""
        s = self.scale
        half_width, half_height = round(radius * 1.25 * s), round(radius * 0.4 * s)
        left, top = round(x * s) - half_width, round((y + radius * 0.9) * s) - half_height
        patch = _shadow_mask(half_width * 2, half_height * 2)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + patch.shape[1], picture.shape[1]), min(top + patch.shape[0], picture.shape[0])
        if x1 > x0 and y1 > y0:
            region = picture[y0:y1, x0:x1]
            region[...] = (region * patch[y0 - top : y1 - top, x0 - left : x1 - left]).astype(np.uint8)

    def thing(self, picture: np.ndarray, index: int, x: float, y: float) -> None:
        """One object, centred at (x, y)."""
        self.drawn.append(("thing", index, x, y))
        colour_name, shape = OBJECTS[index]
        tone, r = self.look.tone[index], self.look.radius[index]
        colour = tuple(float(np.clip(c + d, 0, 255)) for c, d in zip(_RGB[colour_name], tone, strict=True))
        edge = tuple(c * 0.72 for c in colour)
        if shape == "circle":
            centre, unit = self._at(x, y), self._unit
            cv2.circle(picture, centre, round(r * unit), colour, -1, cv2.LINE_AA, _FIXED_POINT_BITS)
            thickness = max(1, round(3 * self.scale))
            cv2.circle(picture, centre, round(r * unit), edge, thickness, cv2.LINE_AA, _FIXED_POINT_BITS)
        elif shape == "square":
            a = r * 0.88
            self._polygon(picture, [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)], colour, edge)
        else:
            corners = [(x, y - r), (x + r * 1.04, y + r * 0.84), (x - r * 1.04, y + r * 0.84)]
            self._polygon(picture, corners, colour, edge)

    def cup(self, picture: np.ndarray, x: float, y: float) -> None:
        """A cup upside down, centred at (x, y), large enough to hide any object."""
        self.drawn.append(("cup", -1, x, y))
        colour = tuple(float(c) for c in self.look.cup)
        edge = tuple(c * 0.66 for c in colour)
        self._polygon(picture, [(x - 40, y - 54), (x + 40, y - 54), (x + 60, y + 56), (x - 60, y + 56)], colour, edge)
        for level in (-34, 40):
            half = 40 + 20 * (level + 54) / 110
            ends = self._at(x - half, y + level), self._at(x + half, y + level)
            thickness = max(1, round(5 * self.scale))
            cv2.line(picture, *ends, edge, thickness, cv2.LINE_AA, _FIXED_POINT_BITS)

    def arm(self, picture: np.ndarray, side: str, x: float, y: float) -> None:
        """A sleeve from one edge of the picture with its hand at (x, y)."""
        self.drawn.append((side, -1, x, y))
        sleeve = tuple(float(c) for c in self.look.sleeve)
        skin = tuple(float(c) for c in self.look.skin)
        if side in (TOP, BOTTOM):
            path = [(x, -40.0 if side == TOP else HEIGHT + 40.0), (x, y)]
        else:
            bar_y = 52.0
            path = [(-40.0 if side == LEFT else WIDTH + 40.0, bar_y), (x, bar_y), (x, y)]
        for colour, width in ((tuple(c * 0.6 for c in sleeve), 34), (sleeve, 27)):
            for start, end in pairwise(path):
                ends = self._at(*start), self._at(*end)
                cv2.line(picture, *ends, colour, max(1, round(width * self.scale)), cv2.LINE_AA, _FIXED_POINT_BITS)
        hand = self._at(x, y)
        for colour, radius in ((tuple(c * 0.6 for c in skin), 19), (skin, 16)):
            cv2.circle(picture, hand, round(radius * self._unit), colour, -1, cv2.LINE_AA, _FIXED_POINT_BITS)


@lru_cache(maxsize=256)
def _shadow_mask(width: int, height: int) -> np.ndarray:
    x = np.linspace(-1, 1, max(width, 2), dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, max(height, 2), dtype=np.float32)[:, None]
    return (1 - 0.38 * np.clip(1.25 * (1 - x * x - y * y), 0, 1))[:, :, None]


class Renderer:
    """Draws one scene. The last still picture is kept, so a quiet second costs only its noise."""

    def __init__(self, script: Script, look: Look, scale: float = 1.0) -> None:
        self.script, self.look = script, look
        self.width, self.height = round(WIDTH * scale), round(HEIGHT * scale)
        self._painter = Painter(look, scale)
        self._background = look.background(self.width, self.height)
        self._still_key: object = None
        self._still: np.ndarray | None = None
        self._still_drawn: list[tuple[str, int, float, float]] = []
        self.drawn: list[tuple[str, int, float, float]] = []  # what the last picture shows, in drawing order
        self._noise_level = look.noise_level * scale

    def render(self, t_s: float) -> np.ndarray:
        """The picture at time `t_s`: (height, width, 3) uint8 RGB, newly allocated."""
        state, moving, version = self.script.initial.copy(), None, 0
        for event in self.script.events:
            if not event.is_light and event.start_s - APPROACH_S <= t_s < event.end_s + APPROACH_S:
                moving = event
                break
            if event.end_s > t_s:
                break
            state.apply(event)
            version += 1
        if moving is not None:
            picture = self._paint(state, moving, t_s)
            self.drawn = self._painter.drawn
        else:
            if self._still_key != version:
                self._still, self._still_key = self._paint(state, None, t_s), version
                self._still_drawn = self._painter.drawn
            picture, self.drawn = np.asarray(self._still), self._still_drawn
        return self._with_noise(picture, t_s)

    def _with_noise(self, picture: np.ndarray, t_s: float) -> np.ndarray:
        tick = round(t_s * 1000)
        dy, dx = (tick * 7919 + self.look.texture_seed) % 64, (tick * 104729 + self.look.texture_seed // 64) % 64
        return add_noise(picture, self._noise_level, dy, dx)

    def _paint(self, state: TableState, moving: WorldEvent | None, t_s: float) -> np.ndarray:
        picture, painter, look = self._background.copy(), self._painter, self.look
        painter.drawn = []
        for slot, thing in enumerate(state.slots):
            handled = moving is not None and thing == moving.thing
            if thing is None or (handled and moving is not None and moving.from_slot != moving.to_slot):
                continue  # `paint_hand_event` draws an object that is being carried
            x, y = look.slot_x[slot], look.slot_y[slot]
            painter.shadow(picture, x, y, look.radius[thing])
            if thing in state.covered and not handled:
                painter.cup(picture, x, y)
            else:
                painter.thing(picture, thing, x, y)
        if moving is not None:
            paint_hand_event(picture, painter, moving, t_s)
        if not state.light:
            picture = cv2.convertScaleAbs(picture, alpha=look.dark)
        return picture


def _ease(p: float) -> float:
    return p * p * (3 - 2 * p)


def paint_hand_event(picture: np.ndarray, painter: Painter, event: WorldEvent, t_s: float) -> None:
    """Draw the arm of a hand event and what it holds, at time `t_s`."""
    look, thing = painter.look, event.handled
    length_s = max(event.end_s - event.start_s, 1e-6)
    progress = _ease(min(max((t_s - event.start_s) / length_s, 0.0), 1.0))
    before = max((event.start_s - t_s) / APPROACH_S, 0.0)  # 1 to 0 while the hand comes
    after = max((t_s - event.end_s) / APPROACH_S, 0.0)  # 0 to 1 while it leaves
    slots = [slot for slot in (event.from_slot, event.to_slot) if slot is not None]
    slot, target = slots[0], slots[-1]
    x, y, r = look.slot_x[slot], look.slot_y[slot], look.radius[thing]
    side = SIDE_OF_KIND[event.kind]
    if event.kind == "put":
        held_y = 62 + (y - 62) * progress - 140 * before
        painter.shadow(picture, x, y, r * (0.5 + 0.5 * progress))
        painter.thing(picture, thing, x, held_y)
        painter.arm(picture, side, x, held_y - 0.6 * r - 240 * after)
    elif event.kind == "take":
        held_y = y + (258 - y) * progress + 160 * after
        painter.thing(picture, thing, x, held_y)
        painter.arm(picture, side, x, held_y + 0.62 * r + 190 * before)
    elif event.kind == "cover":
        low_y = y - r + 0.35 * r - 56  # the cup's rim has just passed the object's top
        cup_y = 60 + (low_y - 60) * progress - 140 * before
        dropped = min(after * 2, 1.0)
        cup_y += (y - cup_y) * dropped
        painter.cup(picture, x, cup_y)
        painter.arm(picture, side, x, cup_y - 22 - 300 * max(after * 2 - 1, 0.0))
    elif event.kind == "uncover":
        high_y = y + 0.1 * r + 54
        cup_y = y + (high_y - y) * (1 - before) + (288 - high_y) * progress + 130 * after
        hand_come = 170 * max(before * 2 - 1, 0.0)
        if before > 0.5:
            cup_y = y
        painter.cup(picture, x, cup_y)
        painter.arm(picture, side, x, cup_y + 20 + hand_come)
    else:
        target_x, target_y = look.slot_x[target], look.slot_y[target]
        held_x, held_y = x + (target_x - x) * progress, y + (target_y - y) * progress
        painter.shadow(picture, held_x, held_y, r)
        painter.thing(picture, thing, held_x, held_y)
        sign = -1 if side == LEFT else 1
        away = 700 * max(before, after)
        painter.arm(picture, side, held_x + sign * (0.9 * r + 6 + away), held_y)

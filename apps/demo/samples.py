"""Training samples: labelled streams at the model's frame size, and crowded scenes for the vision tower alone.

Owns the training distribution (lengths, tasks, windows, spoilt histories, picture quality). Knows no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from apps.demo.conversation import Conversation, garble, spoil, write_conversation
from apps.demo.labels import (
    COUNT,
    LIGHT,
    RESPONSE,
    SILENCE,
    WHERE,
    Question,
    Turn,
    draw_question,
    draw_questions,
    label_turns,
)
from apps.demo.phrases import COLOURS, GROUNDING, GROUNDING_EACH_QUESTION, KINDS, OBJECTS, SHAPES, TASKS, TSQA
from apps.demo.render import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Look, Painter, Renderer, add_noise
from apps.demo.script import Flavour, Script, write_script
from apps.demo.world import draw_flavour
from edge.preprocess import PreprocessConfig, resize_frame

FIRST_TRAINING_SEED = 1_000_000
SIZE = PreprocessConfig(min_pixels=3136, max_pixels=11760)
CELL_ROWS, CELL_COLUMNS = 3, 5
NO_KIND = len(KINDS)
ABSENT, VISIBLE, COVERED, UNKNOWN = 0, 1, 2, 255
_SIDES = {TOP: 1, BOTTOM: 2, LEFT: 3, RIGHT: 4}


@dataclass(frozen=True)
class Mix:
    """Which streams training sees.

    Attributes:
      task_weights: chance of each of `phrases.TASKS`.
      crowded_grounding: share of grounding streams in which one question soon follows another; in the others one
        question stays in force while much happens that it does not ask for.
      each_grounding: share of grounding streams that ask for the time of every event.
      cut: share of streams that are cut out of a longer one, as a sliding window does.
      late: share of streams that start at some later time.
      latest_s: bound of that time, which is drawn evenly by its logarithm.
      spoilt: share of streams with some wrong replies in their history.
      derailed: share of streams whose history begins with replies that another question would have had, or holds
        replies that are no language at all: what a model that runs for days will say once must not lead it astray.
    """

    task_weights: tuple[float, ...] = (0.15, 0.13, 0.13, 0.30, 0.29)
    crowded_grounding: float = 1.0
    each_grounding: float = 0.35
    cut: float = 0.18
    late: float = 0.35
    latest_s: float = 10**4.3
    spoilt: float = 0.25
    derailed: float = 0.0


WHOLE_MIX = Mix()
POLISH_MIX = Mix((0.08, 0.08, 0.08, 0.52, 0.24), crowded_grounding=0.25, each_grounding=0.08)
ENDURANCE_MIX = Mix(
    (0.24, 0.16, 0.16, 0.24, 0.20),
    crowded_grounding=0.25,
    each_grounding=0.08,
    cut=0.5,
    late=0.85,
    latest_s=4e6,
    spoilt=0.3,
    derailed=0.3,
)


@dataclass
class Sample:
    """One stream: pictures, tokens, and what the auxiliary heads should find."""

    frames: np.ndarray  # (turns, 84, 140, 3) uint8
    cells: np.ndarray  # (turns, 15, 5) uint8: what, colour, shape, side, light; 255 where it does not apply
    events: np.ndarray  # (turns, 6) uint8: phase, kind, colour, shape, visible count, light
    places: np.ndarray  # (turns, 12) uint8: ABSENT, VISIBLE, COVERED or UNKNOWN
    asked: np.ndarray  # (turns, 6) uint8: task, what it is about, kind, colour, shape; turns of the event so far
    talk: Conversation
    task: str


def cell_labels(drawn: list[tuple[str, int, float, float]], light: bool) -> np.ndarray:
    """What stands in each of the 15 visual tokens' cells: (15, 5) uint8."""
    cells = np.full((CELL_ROWS * CELL_COLUMNS, 5), 255, np.uint8)
    cells[:, 0], cells[:, 3], cells[:, 4] = 0, 0, int(light)
    for what, thing, x, y in drawn:
        column = min(max(int(x * CELL_COLUMNS / WIDTH), 0), CELL_COLUMNS - 1)
        row = min(max(int(y * CELL_ROWS / HEIGHT), 0), CELL_ROWS - 1)
        cell = cells[row * CELL_COLUMNS + column]
        if what == "thing":
            colour, shape = OBJECTS[thing]
            cell[:3] = 1, COLOURS.index(colour), SHAPES.index(shape)
        elif what == "cup":
            cell[:3] = 2, 255, 255
        else:
            cell[3] = _SIDES[what]
    return cells


def _compress(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    quality = int(rng.integers(35, 92))
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))


def draw_frames(rng: np.random.Generator, script: Script, look: Look, turns: range) -> tuple[np.ndarray, np.ndarray]:
    """Frames of whole seconds at the model's size, and their cells' labels.

    A tenth of the streams takes the true path from full-size pictures; the others are drawn smaller, which is faster
    and gives nearly the same pictures.
    """
    scale = float(rng.choice([1.0, 0.5, 0.25], p=[0.1, 0.55, 0.35]))
    compressed, gain = rng.random() < 0.25, float(rng.uniform(0.9, 1.1)) if rng.random() < 0.3 else 1.0
    renderer = Renderer(script, look, scale)
    frames, cells = [], []
    for turn in turns:
        picture = renderer.render(turn)
        if compressed:
            picture = _compress(rng, picture)
        if gain != 1.0:
            picture = cv2.convertScaleAbs(picture, alpha=gain)
        frames.append(resize_frame(picture, SIZE))
        cells.append(cell_labels(renderer.drawn, script.state_before(turn).light))
    return np.stack(frames), np.stack(cells)


def event_labels(script: Script, turns: range) -> tuple[np.ndarray, np.ndarray]:
    """What happens on each turn and where each object is: (turns, 6) and (turns, 12) uint8."""
    events = np.full((len(turns), 6), 255, np.uint8)
    places = np.zeros((len(turns), len(OBJECTS)), np.uint8)
    unknown = set(script.state_before(turns.start).covered)
    for row, turn in enumerate(turns):
        state = script.state_before(turn)
        events[row, :2] = 0, NO_KIND
        events[row, 4:] = len(state.visible), int(state.light)
        for event in script.events:
            if event.first_turn <= turn <= event.done_turn:
                done = event.done_turn == turn
                events[row, :2] = (2 if done else 1), KINDS.index(event.kind)
                if event.thing is not None:
                    colour, shape = OBJECTS[event.thing]
                    events[row, 2:4] = COLOURS.index(colour), SHAPES.index(shape)
        unknown &= state.covered
        for thing in state.slots:
            if thing is not None:
                covered = UNKNOWN if thing in unknown else COVERED
                places[row, thing] = covered if thing in state.covered else VISIBLE
    return events, places


def question_labels(script: Script, asked: dict[int, Question], turns: range) -> np.ndarray:
    """What the question in force asks, and how long an event has run: (turns, 6) uint8; 255 where nothing applies."""
    labels = np.full((len(turns), 6), 255, np.uint8)
    for row, turn in enumerate(turns):
        for event in script.events:
            if event.first_turn <= turn <= event.done_turn and not event.is_light:
                labels[row, 5] = turn - event.first_turn
        before = [start for start in asked if start <= turn]
        if not before:
            continue
        question = asked[max(before)]
        labels[row, 0] = TASKS.index(question.task)
        labels[row, 1] = (COUNT, LIGHT, WHERE, "").index(question.about)
        labels[row, 2] = KINDS.index(question.kind) if question.kind else NO_KIND
        if question.thing is not None:
            colour, shape = OBJECTS[question.thing]
            labels[row, 3:5] = COLOURS.index(colour), SHAPES.index(shape)
    return labels


def draw_sample(seed: int, turns: int, task: str | None = None, plain: bool = False, mix: Mix = WHOLE_MIX) -> Sample:
    """The training stream of a seed.

    Args:
      seed: from `FIRST_TRAINING_SEED` on, so that all smaller seeds stay unseen.
      turns: how many turns it has.
      task: one of `phrases.TASKS`, else by chance.
      plain: no window, time offset, or spoilt history.
      mix: what is drawn how often.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 11]))
    task = task or str(rng.choice(TASKS, p=mix.task_weights))
    cut = 0 if plain or rng.random() >= mix.cut else int(rng.integers(3, 20))
    offset_s = 0 if plain or rng.random() >= mix.late else int(10 ** rng.uniform(0.5, math.log10(mix.latest_s)))
    flavour, about = draw_flavour(rng, task)
    if task == TSQA and about != COUNT and rng.random() < 0.35:
        flavour, about = Flavour(move_weight=0.4), COUNT
    script = write_script(rng, turns + cut, flavour)
    crowded = rng.random() < (mix.crowded_grounding if task == GROUNDING else 0.3)
    asked = draw_questions(
        rng, script, task, flavour.target, about,
        more=0.8 if crowded else 0.2, most=5 if crowded else 2,
        next_tasks=(GROUNDING,) * 4 + TASKS if task == GROUNDING else TASKS,
    )  # fmt: skip
    if task == GROUNDING and rng.random() < mix.each_grounding:
        asked = {0: Question(GROUNDING, GROUNDING_EACH_QUESTION, each=True)}
    truth = label_turns(script, asked, offset_s)
    texts = {turn: question.text for turn, question in asked.items()}
    if rng.random() < 0.1:  # as people ask
        texts = {turn: text.split(" Update your answer")[0] for turn, text in texts.items()}
    window = range(cut, turns + cut)
    truth, texts, unlearned = _cut(script, truth, texts, window)
    said = {}
    if not plain and rng.random() < mix.spoilt:
        said = spoil(rng, truth, min(texts, default=0), float(rng.uniform(0.02, 0.2)))
    if mix.derailed and rng.random() < mix.derailed:
        said |= _derail(rng, script, truth, texts, offset_s, window)
    talk = write_conversation(truth, texts, offset_s + cut, said, unlearned)
    frames, cells = draw_frames(rng, script, Look(rng), window)
    events, places = event_labels(script, window)
    return Sample(frames, cells, events, places, question_labels(script, asked, window), talk, task)


def _cut(
    script: Script, truth: list[Turn], texts: dict[int, str], window: range
) -> tuple[list[Turn], dict[int, str], frozenset[int]]:
    """Keep only a window's turns, the questions from before it attached to the first of them."""
    start = window.start
    kept = {turn - start: text for turn, text in texts.items() if turn in window}
    earlier = [texts[turn] for turn in sorted(texts) if turn < start]
    unlearned: set[int] = set()
    if earlier:
        kept[0] = "\n".join([*earlier, kept[0]] if 0 in kept else earlier)
        unlearned.add(0)  # its answer was given when the window still reached further back
        for event in script.events:
            if event.first_turn < start <= event.done_turn and truth[event.done_turn].text.startswith("Given event"):
                unlearned.add(event.done_turn - start)
    return truth[start : window.stop], kept, frozenset(unlearned)


def _derail(
    rng: np.random.Generator, script: Script, truth: list[Turn], texts: dict[int, str], offset_s: int, window: range
) -> dict[int, Turn]:
    """Replies of the window's earlier turns to a question that nobody asked, or one or two that are no language."""
    first = min(texts, default=len(truth))
    if len(truth) - first < 4:
        return {}
    if rng.random() < 0.5:
        turns = rng.integers(first, len(truth) - 2, int(rng.integers(1, 3)))
        return {int(turn): Turn(RESPONSE, garble(rng, truth)) for turn in turns}
    task = str(rng.choice(TASKS))
    other = label_turns(script, {0: draw_question(rng, script, task, 0)}, offset_s)[window.start : window.stop]
    last = int(rng.integers(first + 2, len(truth)))
    return {turn: other[turn] for turn in range(first, last)}


def draw_crowd(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A crowded picture for the vision tower: (84, 140, 3) uint8 and its cells' labels (15, 5)."""
    rng = np.random.Generator(np.random.PCG64([seed, 12]))
    look = Look(rng)
    scale = 0.5 if rng.random() < 0.3 else 0.25
    painter = Painter(look, scale)
    picture = look.background(round(WIDTH * scale), round(HEIGHT * scale))
    cells = rng.permutation(CELL_ROWS * CELL_COLUMNS)[: int(rng.integers(3, 9))]
    drawn = 0
    for cell in cells.tolist():
        row, column = divmod(cell, CELL_COLUMNS)
        x, y = column * 112 + float(rng.uniform(14, 98)), row * 112 + float(rng.uniform(14, 98))
        r = 45.0
        if rng.random() < 0.15:
            painter.cup(picture, x, y)
        else:
            thing = int(rng.integers(len(OBJECTS)))
            look.radius[thing] = r = float(rng.uniform(38, 52))
            painter.shadow(picture, x, y, r)
            painter.thing(picture, thing, x, y)
        if drawn < 2 and rng.random() < 0.35:
            drawn += 1
            side = (TOP, BOTTOM, LEFT, RIGHT)[int(rng.integers(4))]
            dx, dy = {TOP: (0, -0.6 * r), BOTTOM: (0, 0.6 * r), LEFT: (-r - 4, 0), RIGHT: (r + 4, 0)}[side]
            painter.arm(picture, side, x + dx, y + dy)
    light = bool(rng.random() < 0.65)
    if not light:
        picture = cv2.convertScaleAbs(picture, alpha=look.dark)
    picture = add_noise(picture, look.noise_level * scale, int(rng.integers(64)), int(rng.integers(64)))
    if rng.random() < 0.2:
        picture = _compress(rng, picture)
    return resize_frame(picture, SIZE), cell_labels(painter.drawn, light)


def silent(turns: int) -> list[Turn]:
    """A truth of nothing but silence."""
    return [Turn(SILENCE) for _ in range(turns)]

"""The demonstration's streams: one seed gives one scene, its pictures, its questions and the true answers.

Owns how a seed becomes a stream. Needs numpy and OpenCV only; the same seed gives the same stream everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from apps.demo import phrases
from apps.demo.labels import COUNT, LIGHT, WHERE, Question, Turn, draw_question, draw_questions, label_turns
from apps.demo.labels import quiet_turns as quiet_turns_of
from apps.demo.phrases import EVENT, GROUNDING, NARRATION, OBJECTS, TASKS, TSQA
from apps.demo.render import HEIGHT, WIDTH, Look, Renderer
from apps.demo.script import Flavour, Script, WorldEvent, write_script

MIN_DURATION_S, MAX_DURATION_S = 20, 45


@dataclass
class Stream:
    """One stream of the demonstration world.

    `questions` and `truth` are by turn: turn t is the second that starts at t, and its frame is `render(t)`.
    """

    seed: int
    task: str
    duration_s: int
    script: Script
    look: Look
    asked: dict[int, Question]
    truth: list[Turn]
    width: int = WIDTH
    height: int = HEIGHT
    _renderer: Renderer | None = field(default=None, repr=False)

    @property
    def questions(self) -> dict[int, str]:
        """The text of each question, by the turn that carries it."""
        return {turn: question.text for turn, question in self.asked.items()}

    @property
    def events(self) -> tuple[WorldEvent, ...]:
        """The ground-truth event log."""
        return self.script.events

    def render(self, t_s: float) -> np.ndarray:
        """The picture at any time: (336, 560, 3) uint8 RGB."""
        if self._renderer is None:
            self._renderer = Renderer(self.script, self.look)
        return self._renderer.render(t_s)


def _generator(seed: int, purpose: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, purpose]))


def draw_flavour(rng: np.random.Generator, task: str) -> tuple[Flavour, str]:
    """What a scene for `task` is made for, and with TSQA the kind of its question."""
    if task != TSQA:
        return Flavour(), ""
    about = (COUNT, LIGHT, WHERE)[int(rng.integers(3))]
    if about == LIGHT:
        return Flavour(light_weight=3.5), about
    if about == COUNT:
        return Flavour(move_weight=0.4), about
    return Flavour(target=int(rng.integers(len(OBJECTS))), initial_covers=False), about


def make_stream(seed: int, task: str | None = None, duration_s: int | None = None) -> Stream:
    """The stream of a seed.

    Args:
      seed: any non-negative integer; without `task`, tasks take turns with it.
      task: one of `phrases.TASKS`.
      duration_s: whole seconds; without it, 20 to 45 by chance.

    Raises:
      ValueError: an unknown task, or a duration under 2 s.
    """
    task = task or TASKS[seed % len(TASKS)]
    if task not in TASKS:
        raise ValueError(f"a task is one of {', '.join(TASKS)}, found {task!r}")
    rng = _generator(seed)
    drawn_s = int(rng.integers(MIN_DURATION_S, MAX_DURATION_S + 1))
    duration_s = drawn_s if duration_s is None else duration_s
    if duration_s < 2:
        raise ValueError(f"a stream lasts at least 2 s, found {duration_s} s")
    flavour, about = draw_flavour(rng, task)
    script = write_script(rng, duration_s, flavour)
    asked = draw_questions(rng, script, task, flavour.target, about)
    return Stream(seed, task, duration_s, script, Look(_generator(seed, 1)), asked, label_turns(script, asked))


def make_demo_stream(seed: int = 7, seconds: int = 60) -> Stream:
    """One scene with a question of several kinds in each quarter: narration, counting, an event to find, a place.

    Raises:
      ValueError: fewer than 24 seconds, too short for four questions.
    """
    if seconds < 24:
        raise ValueError(f"the demonstration needs at least 24 s, found {seconds} s")
    rng = _generator(seed, 2)
    target = int(rng.integers(len(OBJECTS)))
    script = write_script(rng, seconds, Flavour(target=target, initial_covers=False))
    quarter = seconds // 4
    asked = {0: Question(NARRATION, phrases.NARRATION_QUESTIONS[0])}
    plan = ((quarter, TSQA, COUNT), (2 * quarter, GROUNDING, ""), (3 * quarter, TSQA, WHERE))
    for turn, task, about in plan:
        turn = min((quiet for quiet in quiet_turns_of(script) if quiet >= turn), default=turn)
        question = draw_question(rng, script, task, turn, target, about)
        if task == GROUNDING:
            question = _findable(rng, script, turn, turn + quarter) or Question(EVENT, phrases.EVENT_QUESTIONS[0])
        asked[turn] = question
    return Stream(seed, "demo", seconds, script, Look(_generator(seed, 3)), asked, label_turns(script, asked))


def _findable(rng: np.random.Generator, script: Script, turn: int, end: int) -> Question | None:
    """A grounding question whose event runs between the two turns, or None."""
    for _ in range(64):
        question = draw_question(rng, script, GROUNDING, turn)
        if question.event is not None and question.event.done_turn < end:
            return question
    return None

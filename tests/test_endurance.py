"""A stream that lasts: late seconds are as good as early ones, and one mad reply does not bring the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import edge
from apps.demo.conversation import encode
from apps.demo.labels import Question, label_turns
from apps.demo.metrics import Scores
from apps.demo.phrases import EVENT, EVENT_QUESTIONS, NARRATION, NARRATION_QUESTIONS
from apps.demo.world import make_stream
from edge.backends import load_backend
from edge.prompt import IM_END

GARBAGE = "</Response> A hand moves" + "7224678723477872347787" * 3
ASKED = NARRATION_QUESTIONS[0]
Say = Callable[[int], str | None]


class Prompted:
    """A backend whose model can be made to say something else than it would."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._words: list[int] = []
        self._asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def say(self, text: str | None) -> None:
        self._words = [] if text is None else [*encode(text), *encode(IM_END)]

    def run_decoder(self, *arguments: Any) -> np.ndarray:
        logits = self._backend.run_decoder(*arguments)
        if not self._words:
            return logits
        forced = np.zeros_like(logits)
        forced[self._words.pop(0)] = 1
        return forced


def narrate(bundle: edge.Bundle, seed: int, seconds: range, first_t: int, say: Say = lambda turn: None) -> Any:
    """Follow part of a stream; returns the score by a range of turns."""
    backend = Prompted(load_backend("cpu", bundle, threads=1))
    session = edge.StreamSession(bundle, backend=backend)
    session.ask(ASKED)
    stream = make_stream(seed, NARRATION, duration_s=300)
    truth = label_turns(stream.script, {0: Question(NARRATION, ASKED)})
    answers = []
    for second in seconds:
        backend.say(say(second))
        turn = session.push(stream.render(second), first_t + second)
        answers.append((turn.state.value, turn.text))

    def score(turns: range) -> float:
        scores = Scores()
        scores.add([answers[t - seconds.start] for t in turns], [truth[t] for t in turns])
        return scores.report()["response_f1"]

    return score


def another_tasks_words(seed: int) -> Sequence[Any]:
    stream = make_stream(seed, NARRATION, duration_s=300)
    return label_turns(stream.script, {0: Question(EVENT, EVENT_QUESTIONS[0])})


def test_the_second_at_which_a_day_once_went_wrong_goes_right(demo_bundle):
    score = narrate(demo_bundle, 90_082, range(40, 100), first_t=24_600)
    assert score(range(45, 100)) == 1.0


@pytest.mark.parametrize("first_t", [9_970, 99_950, 604_800])
def test_narration_is_right_at_late_seconds(demo_bundle, first_t):
    score = narrate(demo_bundle, 90_001, range(100), first_t)
    assert score(range(100)) >= 0.97


def test_a_mad_reply_does_not_bring_the_next(demo_bundle):
    score = narrate(demo_bundle, 90_002, range(120), 0, lambda t: GARBAGE if t in (20, 24, 31) else None)
    assert score(range(32, 120)) >= 0.97


def test_replies_to_a_question_that_was_never_asked_do_not_bring_more_of_them(demo_bundle):
    other = another_tasks_words(90_003)
    words = {"silence": "</Silence>", "standby": "</Standby>"}

    def say(t: int) -> str | None:
        return (words.get(other[t].state) or f"</Response> {other[t].text}") if 5 <= t < 40 else None

    score = narrate(demo_bundle, 90_003, range(160), 0, say)
    assert score(range(45, 160)) >= 0.95

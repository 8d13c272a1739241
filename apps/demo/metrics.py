"""How well a model's answers agree with the truth. Pure Python; knows neither pictures nor models.

- `response_f1`: a response is right when a true one lies within one second and says the same; every response is used
  once. In a grounding reply each named time may differ by one second too: it is the same tolerance. F1 over all
  responses of all streams together.
- `state_accuracy`: share of turns, from the first question on, whose state (silence, standby, response) is right.
- `answer_accuracy`: of the true responses that the model answered within one second, the share whose text is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE_S = 1
RESPONSE = "response"
_GROUNDING = re.compile(r"^Given event occurred between (\d+)s to (\d+)s\.$")


def same_text(said: str, truth: str, tolerance_s: int = TOLERANCE_S) -> bool:
    """Whether a reply says what is true; times of grounding replies may be off by `tolerance_s` each."""
    said, truth = said.strip(), truth.strip()
    if said == truth:
        return True
    said_times, true_times = _GROUNDING.match(said), _GROUNDING.match(truth)
    if not said_times or not true_times:
        return False
    pairs = zip(said_times.groups(), true_times.groups(), strict=True)
    return all(abs(int(one) - int(other)) <= tolerance_s for one, other in pairs)


@dataclass
class Tally:
    """Counts that the figures are computed from; tallies of several streams add up."""

    matched: int = 0
    said: int = 0
    true: int = 0
    right_states: int = 0
    turns: int = 0
    answered: int = 0
    answered_right: int = 0
    n_streams: int = 0

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float | int]:
        """The figures; a share of nothing counts as 1."""
        responses = self.said + self.true
        return {
            "response_f1": 2 * self.matched / responses if responses else 1.0,
            "state_accuracy": self.right_states / self.turns if self.turns else 1.0,
            "answer_accuracy": self.answered_right / self.answered if self.answered else 1.0,
            "n_streams": self.n_streams,
        }


def _pair(said: list[tuple[int, str]], true: list[tuple[int, str]], by_text: bool) -> list[tuple[int, int]]:
    """Greedy one-to-one pairs (index said, index true), nearest first; with `by_text` only where the texts agree."""
    near = []
    for i, (said_turn, said_text) in enumerate(said):
        for j, (true_turn, true_text) in enumerate(true):
            distance = abs(said_turn - true_turn)
            if distance <= TOLERANCE_S and (not by_text or same_text(said_text, true_text)):
                near.append((distance, j, i))
    pairs, used_said, used_true = [], set(), set()
    for _, j, i in sorted(near):
        if i not in used_said and j not in used_true:
            used_said.add(i)
            used_true.add(j)
            pairs.append((i, j))
    return pairs


def score_turns(answers: Sequence[tuple[str, str]], truth: Sequence, first_turn: int = 0) -> dict[str, Tally]:
    """Compare one stream's answers with the truth.

    Args:
      answers: (state, text) by turn.
      truth: objects with `state`, `text` and `task`, as many as there are answers.
      first_turn: the turn of the first question; turns before it do not count.

    Returns:
      A tally for each task in force in the stream; a second question of another task gives a second tally.

    Raises:
      ValueError: a different number of answers and of true turns.
    """
    if len(answers) != len(truth):
        raise ValueError(f"a stream of {len(truth)} turns needs as many answers, found {len(answers)}")
    tallies: dict[str, Tally] = {}
    for task in dict.fromkeys(turn.task for turn in truth[first_turn:]):
        turns = [t for t in range(first_turn, len(truth)) if truth[t].task == task]
        said = [(t, answers[t][1]) for t in turns if answers[t][0] == RESPONSE]
        true = [(t, truth[t].text) for t in turns if truth[t].state == RESPONSE]
        answered = _pair(said, true, by_text=False)
        tallies[task] = Tally(
            matched=len(_pair(said, true, by_text=True)),
            said=len(said),
            true=len(true),
            right_states=sum(answers[t][0] == truth[t].state for t in turns),
            turns=len(turns),
            answered=len(answered),
            answered_right=sum(same_text(said[i][1], true[j][1]) for i, j in answered),
            n_streams=1,
        )
    return tallies


class Scores:
    """Adds up streams and reports the figures, over all and by task."""

    def __init__(self) -> None:
        self._tasks: dict[str, Tally] = {}
        self._n_streams = 0

    def add(self, answers: Sequence[tuple[str, str]], truth: Sequence, first_turn: int = 0) -> None:
        """Count one stream; arguments as for `score_turns`."""
        self._n_streams += 1
        for task, tally in score_turns(answers, truth, first_turn).items():
            self._tasks.setdefault(task, Tally()).add(tally)

    def report(self) -> dict:
        """`response_f1`, `state_accuracy`, `answer_accuracy`, `n_streams`, and under `tasks` the same by task."""
        total = Tally()
        for tally in self._tasks.values():
            total.add(tally)
        total.n_streams = self._n_streams
        return {**total.figures(), "tasks": {task: tally.figures() for task, tally in sorted(self._tasks.items())}}

"""What a user would feel of a bundle's errors, over turns that nothing was tuned on.

Owns the figures: how far two sets of logits are apart, and what that changes in a stream: silence that becomes a
response, a response that comes later, other words. The turns are teacher-forced: both models are given the same
conversation, the unquantised model's own, and every decision in it is compared. Runs no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge.contract import TokenIds
from export.turns import PIECE, TURN, WORD, Conversation

LONGEST_SHIFT_S = 5
"""Responses further apart than this are not the same one, earlier or later."""
RESPONSE, OTHER = "response", "other"
ROWS_AT_A_TIME = 32


@dataclass
class Tally:
    """Decisions of two models, clip by clip.

    Args:
      tokens: how states are spelt.
      interval_s: stream seconds from one turn to the next.
    """

    tokens: TokenIds
    interval_s: int = 1
    turns: int = 0
    words: int = 0
    changed_words: int = 0
    states: Counter[tuple[str, str]] = field(default_factory=Counter)
    shifts_s: list[float] = field(default_factory=list)
    missed: int = 0
    extra: int = 0
    agreed: list[bool] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    not_finite: bool = False

    def add(self, talk: Conversation, expected: np.ndarray, found: np.ndarray) -> None:
        """Compare the held-out turns of one conversation, given the logits (n, V) after each of `held_out_parts`."""
        parts = talk.held_out_parts
        if not np.isfinite(found).all():
            self.not_finite = True
            return
        self.divergences += divergences(found, expected).tolist()
        self.cosines += cosines(found, expected).tolist()
        wanted, chosen = expected.argmax(axis=1).tolist(), found.argmax(axis=1).tolist()
        self.agreed += [one == other for one, other in zip(wanted, chosen, strict=True)]
        roles, turns = [talk.roles[i] for i in parts], [talk.turns[i] for i in parts]
        spoken = [i for i, role in enumerate(roles) if role == WORD]
        self.words += len(spoken)
        self.changed_words += sum(wanted[i] != chosen[i] for i in spoken)
        decisions: dict[int, list[int]] = {}
        for i, (role, turn) in enumerate(zip(roles, turns, strict=True)):
            if role in (TURN, PIECE):
                decisions.setdefault(turn, []).append(i)
        pairs = {
            turn: (self._state([wanted[i] for i in steps], []), self._state(*_path(steps, wanted, chosen)))
            for turn, steps in decisions.items()
        }
        self.turns += len(pairs)
        self.states.update(pairs.values())
        self._add_responses(
            [turn for turn, (state, _) in pairs.items() if state == RESPONSE],
            [turn for turn, (_, state) in pairs.items() if state == RESPONSE],
        )

    def _state(self, ids: list[int], otherwise: list[int]) -> str:
        """The state that `ids` spell, or begin to spell; where they leave the path, `otherwise` is the last of them."""
        ids = [*ids, *otherwise]
        for name in ("silence", "standby", RESPONSE):
            spelt = getattr(self.tokens, name)
            if tuple(ids) == spelt[: len(ids)]:
                return name
        return OTHER

    def _add_responses(self, wanted: Sequence[int], found: Sequence[int]) -> None:
        """Pair responses, the nearest first: one that is missing shifts none of the others."""
        pairs = sorted((abs(other - turn), turn, other) for turn in wanted for other in found)
        missed, extra = set(wanted), set(found)
        for distance, turn, other in pairs:
            if turn in missed and other in extra and distance * self.interval_s <= LONGEST_SHIFT_S:
                missed.remove(turn)
                extra.remove(other)
                self.shifts_s.append((other - turn) * self.interval_s)
        self.missed += len(missed)
        self.extra += len(extra)

    def counts(self) -> dict[str, int]:
        """Of how many decisions each rate is a part."""
        return {"state_flip_rate": self.turns, "changed_word_rate": self.words}

    def figures(self) -> dict[str, Any]:
        """The report: all rates are parts of 1; None where there was nothing to count, or a logit was no number."""
        if self.not_finite:
            return dict.fromkeys(("kl_mean", "kl_max", "logit_cosine_min", "top1_agreement", "state_flip_rate"))
        flips = {f"{one} > {other}": n for (one, other), n in sorted(self.states.items()) if one != other}
        return {
            "kl_mean": _rounded(_mean(self.divergences)),
            "kl_max": _rounded(max(self.divergences, default=None)),
            "logit_cosine_min": _rounded(min(self.cosines, default=None), 7),
            "top1_agreement": _rounded(_mean(self.agreed)),
            "state_flip_rate": _rounded(sum(flips.values()) / self.turns if self.turns else None),
            "state_flips": flips,
            "response_shift_s": _rounded(_mean([abs(shift) for shift in self.shifts_s])),
            "responses_missed": self.missed,
            "responses_extra": self.extra,
            "changed_word_rate": _rounded(self.changed_words / self.words if self.words else None),
            "compared_turns": self.turns,
            "compared_words": self.words,
        }


def _path(steps: list[int], wanted: list[int], chosen: list[int]) -> tuple[list[int], list[int]]:
    """The tokens up to where the second model leaves the first one's path, and the one that it chooses there."""
    for place, i in enumerate(steps):
        if chosen[i] != wanted[i]:
            return [wanted[j] for j in steps[:place]], [chosen[i]]
    return [wanted[i] for i in steps], []


def divergences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(n,) Kullback-Leibler divergence of each row of logits (n, V) from the expected one, in nats."""
    result = np.empty(len(expected))
    for first in range(0, len(expected), ROWS_AT_A_TIME):  # in double, of which a large vocabulary takes much
        rows = slice(first, first + ROWS_AT_A_TIME)
        wanted = log_softmax(expected[rows])
        result[rows] = (np.exp(wanted) * (wanted - log_softmax(found[rows]))).sum(axis=1)
    return result


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """(n,) cosine of each row of logits with the expected one."""
    products = np.einsum("nv,nv->n", found, expected, dtype=np.float64)
    return np.asarray(products / (np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In double, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")

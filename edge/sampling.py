"""How the next token of a reply is chosen from logits: greedy by default, sampled by choice.

Owns the random state. The decision to speak is never sampled (see `session`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Union

import numpy as np

from edge.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Settings of sampled replies. Temperature 0 is greedy.

    `top_k` 0 keeps all tokens; `top_p` keeps the smallest set of tokens whose probabilities reach it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"`temperature` should be from 0 to 10, found {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"`top_k` should be 0 or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"`top_p` should be above 0 and at most 1, found {self.top_p}")


class LogitsOnDevice(Protocol):
    """Logits (V,) that have not left a device. `np.asarray` reads them, at the cost of copying all."""

    def choose(self, sampling: Sampling, random: float) -> int:
        """What a `Sampler` chooses; `random` is its generator's next number, from 0 to below 1."""
        ...


Logits = Union[np.ndarray, LogitsOnDevice]  # noqa: UP007 - evaluated at run time, which Python 3.10 needs spelt so
GREEDY = Sampling()


def largest(logits: Logits) -> int:
    """The token with the largest logit, the first of equal ones."""
    return int(np.argmax(logits)) if isinstance(logits, np.ndarray) else logits.choose(GREEDY, 0.0)


class Sampler:
    """Chooses tokens; the same settings and logits give the same tokens."""

    def __init__(self, settings: Sampling) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)

    def choose(self, logits: Logits) -> int:
        """Token id chosen from (V,) float32 logits, on the device if they are there."""
        settings = self._settings
        if settings.temperature == 0:
            return largest(logits)
        if not isinstance(logits, np.ndarray):
            return logits.choose(settings, self._random.random())
        scaled = logits.astype(np.float64) / settings.temperature
        order = np.argsort(-scaled, kind="stable")
        if settings.top_k:
            order = order[: settings.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        cumulative = np.cumsum(weights / weights.sum())
        kept = int(np.searchsorted(cumulative, settings.top_p)) + 1
        order, cumulative = order[:kept], cumulative[:kept]
        return int(order[np.searchsorted(cumulative, self._random.random() * cumulative[-1])])

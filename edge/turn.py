"""What one turn gives back: the model's decision, its words, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np


class TurnState(str, Enum):
    """The model's decision for one second of the stream."""

    SILENCE = "silence"
    STANDBY = "standby"
    RESPONSE = "response"


@dataclass(frozen=True)
class Turn:
    """The result of one `StreamSession.push`.

    Attributes:
      t: stream second of the turn's frame.
      state: the decision.
      text: the reply without its state token; empty unless `state` is RESPONSE (or the model broke the protocol).
      logits: (V,) float32 logits after the turn's last prompt token; None where the model was not asked (no question
        yet). A copy: it stays valid.
      question: the question that joined this turn, or "".
      reply_tokens: generated tokens, the state token included.
      truncated: the reply reached the cap on its length and was cut.
      off_protocol: the first token was none of the three states; `text` is the raw reply.
      evicted_turns: turns that left the window to make room for this one.
      timing_ms: `preprocess`, `encode`, `append`, `decode` and `turn`, in milliseconds.
    """

    t: int
    state: TurnState
    text: str = ""
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    question: str = ""
    visual_tokens: int = 0
    reply_tokens: int = 0
    truncated: bool = False
    off_protocol: bool = False
    evicted_turns: int = 0
    kv_tokens: int = 0
    timing_ms: dict[str, float] = field(default_factory=dict, compare=False)

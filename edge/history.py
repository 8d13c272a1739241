"""The turns that are still in the window, and what a prompt needs to say them again: the `rebuild` policy's memory.

Owns the record of each kept turn, visual tokens included, in memory that is allocated once. Does not decide when a turn
leaves (see `rebuild`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from edge.decoder import FrameTokens
from edge.questions import OpenQuestion


@dataclass
class KeptTurn:
    """One turn of the window.

    Attributes:
      t: stream second.
      questions: what was asked at this turn.
      frame: the visual tokens; a view into the history's ring.
      reply_ids: the assistant's tokens, state included, closing tokens not.
    """

    t: int
    questions: list[OpenQuestion]
    frame: FrameTokens
    reply_ids: list[int] = field(default_factory=list)


class History:
    """The newest turns, oldest first, with a ring that holds their visual tokens.

    Args:
      max_turns: places in the ring.
      max_visual_tokens: most visual tokens that one frame can have.
      hidden_size: width of a visual token.
    """

    def __init__(self, max_turns: int, max_visual_tokens: int, hidden_size: int) -> None:
        self._ring = np.zeros((max_turns, max_visual_tokens, hidden_size), np.float32)
        self._turns: deque[KeptTurn] = deque()
        self._next_place = 0

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def oldest(self) -> KeptTurn:
        """The turn that leaves next."""
        return self._turns[0]

    @property
    def newest(self) -> KeptTurn:
        """The turn that was kept last."""
        return self._turns[-1]

    def before_newest(self) -> Iterator[KeptTurn]:
        """All turns but the newest, oldest first."""
        return islice(self._turns, max(0, len(self._turns) - 1))

    def append(self, t: int, questions: list[OpenQuestion], frame: FrameTokens) -> KeptTurn:
        """Keep a turn; its visual tokens are copied into the ring.

        Raises:
          ValueError: every place is taken; evict first.
        """
        if len(self._turns) == len(self._ring):
            raise ValueError(f"all {len(self._ring)} places of the history are taken")
        place = self._ring[self._next_place, : len(frame.embeds)]
        place[:] = frame.embeds
        self._next_place = (self._next_place + 1) % len(self._ring)
        turn = KeptTurn(t, questions, FrameTokens(place, frame.rows, frame.columns))
        self._turns.append(turn)
        return turn

    def evict_oldest(self) -> KeptTurn:
        """Forget the oldest turn and return it; its visual tokens are soon overwritten."""
        return self._turns.popleft()

    def clear(self) -> None:
        """Forget every turn."""
        self._turns.clear()
        self._next_place = 0

"""What a session needs of the policy that decides which turns stay in the window.

`rebuild.RebuildWindow` and `slide.SlideWindow` are the two policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edge.decoder import FrameTokens, Segment
from edge.questions import OpenQuestion


@dataclass(frozen=True)
class Prompt:
    """What to prefill for a turn.

    Attributes:
      segments: none at all where nothing needs to be computed, because nobody has asked anything.
      evicted_turns: turns that left to make room.
    """

    segments: list[Segment]
    evicted_turns: int


class Window(Protocol):
    """The kept turns, oldest first."""

    def __len__(self) -> int: ...

    def begin_turn(self, t: int, joined: Sequence[OpenQuestion], frame: FrameTokens, *, asked: bool) -> Prompt:
        """Make room for a turn and say what to prefill for it.

        Args:
          joined: questions that join the turn.
          frame: its visual tokens; only valid during the turn.
          asked: whether any question is open.
        """
        ...

    def end_turn(self, reply_ids: list[int], unfed_ids: list[int]) -> None:
        """The turn's reply is over.

        Args:
          reply_ids: its tokens, state included, closing tokens not.
          unfed_ids: those of them that the cache does not hold yet.
        """
        ...

    def reset(self) -> None:
        """Forget every turn; nothing is allocated again."""
        ...

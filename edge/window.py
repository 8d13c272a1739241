"""What happens to the conversation when the window is full: the `rebuild` policy.

Owns the choice of the turns that leave and of the tokens that the cache must be given. Does not run the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.decoder import FrameTokens, Segment
from edge.history import History, KeptTurn
from edge.kv_cache import CacheMark, KVCache
from edge.prompt import IM_END, Protocol
from edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenQuestion:
    """A question and the stream second at which it joined the conversation."""

    t: int
    text: str


class Conversation:
    """Token ids of the conversation's parts."""

    def __init__(self, tokenizer: Tokenizer, protocol: Protocol) -> None:
        self._tokenizer = tokenizer
        self._protocol = protocol
        self.system_ids = tokenizer.encode(protocol.system_text())
        self.closing_ids = tokenizer.encode(f"{IM_END}\n")

    def turn_segments(self, turn: KeptTurn) -> list[Segment]:
        """The user's side of a turn, up to where the assistant's first token follows."""
        before, after = self._protocol.turn_text(turn.t, turn.question)
        return [self._tokenizer.encode(before), turn.frame, self._tokenizer.encode(after)]

    def whole_turn_segments(self, turn: KeptTurn) -> list[Segment]:
        """Both sides of a turn."""
        return [*self.turn_segments(turn), [*turn.reply_ids, *self.closing_ids]]

    def turn_text_tokens(self, t: int) -> int:
        """Text tokens of the user's side of a turn without a question."""
        before, after = self._protocol.turn_text(t)
        return len(self._tokenizer.encode(before)) + len(self._tokenizer.encode(after))

    def question_tokens(self, questions: list[OpenQuestion]) -> int:
        """Tokens that the questions take together."""
        return len(self._tokenizer.encode("\n".join(question.text for question in questions)))


def tokens_of(segments: list[Segment]) -> int:
    """Cache rows that the segments take."""
    return sum(len(s.embeds) if isinstance(s, FrameTokens) else len(s) for s in segments)


class RebuildWindow:
    """Keeps the newest turns and prefills them again, from position 0 on, whenever the oldest had to leave.

    This is what Streamo's own loop computes by sending everything again, without encoding any frame twice.

    Args:
      after_system: the cache's state behind the system prompt, which is never prefilled again.
      reserve_tokens: rows that a reply may still need behind the turn.
    """

    def __init__(
        self,
        conversation: Conversation,
        history: History,
        kv_cache: KVCache,
        after_system: CacheMark,
        *,
        window_turns: int,
        reserve_tokens: int,
    ) -> None:
        self._conversation = conversation
        self._history = history
        self._kv_cache = kv_cache
        self._after_system = after_system
        self._window_turns = window_turns
        self._reserve_tokens = reserve_tokens
        self._stale = False  # the cache lags behind the history, because nobody has asked anything yet

    def reset(self) -> None:
        """The conversation starts again."""
        self._kv_cache.truncate(self._after_system)
        self._stale = False

    def prompt_for(
        self, newest: KeptTurn, pending_ids: list[int], questions: list[OpenQuestion]
    ) -> tuple[list[Segment], int]:
        """What to prefill for the newest turn of the history.

        Args:
          newest: the turn just appended to the history.
          pending_ids: tokens of the reply before that the cache does not hold yet.
          questions: all open questions; those older than the first kept turn are attached to it.

        Returns:
          the segments, and how many turns were evicted to make room. If any was, the cache has been cut back to the
          system prompt. No segments at all: the window is full and nobody has asked anything, so there is nothing to
          compute until somebody does.
        """
        evicted = 0
        while len(self._history) > self._window_turns:
            self._evict_oldest(questions)
            evicted += 1
        if evicted or self._stale:
            segments, used = self._whole_window(newest), self._after_system.length
        else:
            segments, used = [pending_ids, *self._conversation.turn_segments(newest)], self._kv_cache.length
        while (
            len(self._history) > 1
            and used + tokens_of(segments) + self._reserve_tokens > self._kv_cache.capacity_tokens
        ):
            self._evict_oldest(questions)
            evicted += 1
            segments, used = self._whole_window(newest), self._after_system.length
        if evicted or self._stale:
            self._kv_cache.truncate(self._after_system)
            self._stale = not questions
        return ([] if self._stale else segments), evicted

    def _evict_oldest(self, questions: list[OpenQuestion]) -> None:
        """Drop a turn; the questions asked up to the new first turn are attached to that."""
        self._history.evict_oldest()
        first = self._history.oldest
        first.question = "\n".join(question.text for question in questions if question.t <= first.t)

    def _whole_window(self, newest: KeptTurn) -> list[Segment]:
        segments: list[Segment] = []
        for turn in self._history.before_newest():
            segments += self._conversation.whole_turn_segments(turn)
        return [*segments, *self._conversation.turn_segments(newest)]

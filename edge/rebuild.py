"""The `rebuild` policy: when the oldest turn leaves, the window is prefilled again.

Owns the choice of the turns that leave and of the tokens that the cache must be given. Does not run the model.
This is what Streamo's own loop computes by sending everything again, without encoding any frame twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge.conversation import Conversation, tokens_of
from edge.decoder import FrameTokens, Segment
from edge.history import History, KeptTurn
from edge.kv_cache import CacheMark, KVCache
from edge.questions import OpenQuestion
from edge.window import Prompt


class RebuildWindow:
    """Keeps the newest turns and prefills them again, from position 0 on, whenever the oldest had to leave.

    Args:
      after_system: the cache's state behind the system prompt, which is never prefilled again.
      history: holds the visual tokens of the kept turns.
      reserve_tokens: rows that a reply may still need behind the turn.
    """

    def __init__(
        self,
        conversation: Conversation,
        kv_cache: KVCache,
        after_system: CacheMark,
        history: History,
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
        self.reset()

    def __len__(self) -> int:
        return len(self._history)

    def reset(self) -> None:
        self._kv_cache.truncate(self._after_system)
        self._history.clear()
        self._pinned: list[OpenQuestion] = []  # open questions of turns that left; they open the first kept turn
        self._pending_ids: list[int] = []  # the end of the reply before, which the cache does not hold yet
        self._stale = False  # the cache lags behind the history

    def begin_turn(self, t: int, joined: Sequence[OpenQuestion], frame: FrameTokens, *, asked: bool) -> Prompt:
        newest = self._history.append(t, list(joined), frame)
        if any(question.closed for question in self._pinned):
            self._pinned = [question for question in self._pinned if not question.closed]
            self._stale = True
        evicted = 0
        while len(self._history) > self._window_turns:
            self._evict_oldest()
            evicted += 1
        segments = self._segments(newest)
        while len(self._history) > 1 and not self._has_room(segments):
            self._evict_oldest()
            evicted += 1
            segments = self._segments(newest)
        if self._stale:
            self._kv_cache.truncate(self._after_system)
            self._stale = not asked
        return Prompt([] if self._stale else segments, evicted)

    def end_turn(self, reply_ids: list[int], unfed_ids: list[int]) -> None:
        self._history.newest.reply_ids = reply_ids
        self._pending_ids = [*unfed_ids, *self._conversation.closing_ids]

    def _evict_oldest(self) -> None:
        oldest = self._history.evict_oldest()
        self._pinned += [question for question in oldest.questions if not question.closed]
        self._stale = True

    def _has_room(self, segments: list[Segment]) -> bool:
        """Whether the segments and a reply behind them fit."""
        used = self._after_system.token if self._stale else self._kv_cache.length
        return used + tokens_of(segments) + self._reserve_tokens <= self._kv_cache.capacity_tokens

    def _segments(self, newest: KeptTurn) -> list[Segment]:
        if not self._stale:
            return [self._pending_ids, *self._turn_segments(newest)]
        segments: list[Segment] = []
        for turn in self._history.before_newest():
            segments += [*self._turn_segments(turn), [*turn.reply_ids, *self._conversation.closing_ids]]
        return [*segments, *self._turn_segments(newest)]

    def _turn_segments(self, turn: KeptTurn) -> list[Segment]:
        pinned = self._pinned if turn is self._history.oldest else []
        texts = [question.text for question in (*pinned, *turn.questions)]
        return self._conversation.turn_segments(turn.t, texts, turn.frame)

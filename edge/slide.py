"""The `slide` policy: the oldest turn is cut out of the cache, and everything behind it moves up.

Owns where the parts of each kept turn lie on the cache's tape, and which of them leave. Touches no cache memory: see
`kv_cache` for how what is left keeps its rotated keys.

The kept tokens are, one for one, those that `rebuild` would prefill: the first turn's header stays for ever, the open
questions of turns that left stand behind it, and the header of the first kept turn leaves with the turn before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from edge.conversation import Conversation, TurnIds
from edge.decoder import FrameTokens, Segment
from edge.kv_cache import CacheMark, KVCache
from edge.questions import OpenQuestion
from edge.window import Prompt

REBASE_POSITION = 1 << 20
"""Beyond this position the next turn is rotated as if the stream had just begun; float32 angles would lose digits."""


@dataclass(frozen=True)
class _PlacedQuestion:
    question: OpenQuestion
    start: CacheMark
    end: CacheMark


@dataclass(frozen=True)
class _PlacedTurn:
    """Where a turn is: its questions follow its header, and the rest of it ends where the next turn starts."""

    header_end: CacheMark
    questions: list[_PlacedQuestion]


class SlideWindow:
    """Keeps the newest turns in the cache, where they are, at constant cost.

    Args:
      after_system: the cache's state behind the system prompt, which never leaves.
      reserve_tokens: rows that a reply may still need behind the turn.
    """

    def __init__(
        self,
        conversation: Conversation,
        kv_cache: KVCache,
        after_system: CacheMark,
        *,
        window_turns: int,
        reserve_tokens: int,
    ) -> None:
        self._conversation = conversation
        self._kv_cache = kv_cache
        self._after_system = after_system
        self._window_turns = window_turns
        self._reserve_tokens = reserve_tokens
        self.reset()

    def __len__(self) -> int:
        return len(self._turns)

    def reset(self) -> None:
        self._kv_cache.truncate(self._after_system)
        self._turns: deque[_PlacedTurn] = deque()
        self._pinned: list[_PlacedQuestion] = []  # open questions of turns that left
        self._has_header = False  # a header that no turn owns any more stands in front of the first kept turn
        self._pending_ids: list[int] = []  # the end of the reply before, which the cache does not hold yet

    def begin_turn(self, t: int, joined: Sequence[OpenQuestion], frame: FrameTokens, *, asked: bool) -> Prompt:
        self._drop_closed()
        ids = self._conversation.turn_ids(t, [question.text for question in joined])
        evicted = 0
        while self._turns and (len(self._turns) >= self._window_turns or not self._has_room(ids, frame)):
            self._evict_oldest()
            evicted += 1
        if self._kv_cache.rotated_position >= REBASE_POSITION:
            self._kv_cache.rebase()
        header = self._header(ids)
        self._place(len(header), ids, joined)
        text = [*self._pending_ids, *header, *(i for line in ids.questions for i in line), *ids.before_frame]
        segments: list[Segment] = [text, frame, ids.after_frame]
        return Prompt(segments, evicted)

    def end_turn(self, reply_ids: list[int], unfed_ids: list[int]) -> None:
        self._pending_ids = [*unfed_ids, *self._conversation.closing_ids]

    def _header(self, ids: TurnIds) -> list[int]:
        """The newest turn's header, unless it is the first kept turn and finds one in place."""
        return [] if self._has_header and not self._turns else ids.header

    def _has_room(self, ids: TurnIds, frame: FrameTokens) -> bool:
        text = len(self._header(ids)) + sum(map(len, ids.questions)) + len(ids.before_frame) + len(ids.after_frame)
        needed = len(self._pending_ids) + text + len(frame.embeds) + self._reserve_tokens
        return needed <= self._kv_cache.free_tokens

    def _place(self, header_tokens: int, ids: TurnIds, joined: Sequence[OpenQuestion]) -> None:
        """Note where the turn that is about to be prefilled will be. Text advances one position a token."""
        in_front = len(self._pending_ids) + header_tokens
        header_end = here = self._kv_cache.mark().behind(in_front, in_front)
        questions = []
        for question, line in zip(joined, ids.questions, strict=True):
            end = here.behind(len(line), len(line))
            questions.append(_PlacedQuestion(question, here, end))
            here = end
        self._turns.append(_PlacedTurn(header_end, questions))

    def _evict_oldest(self) -> None:
        """Cut out the oldest turn and the header of the next; its open questions stay in front of that."""
        oldest = self._turns.popleft()
        kept_from = oldest.header_end
        for placed in oldest.questions:
            if placed.question.closed:
                continue
            self._kv_cache.evict(kept_from, placed.start)
            self._pinned.append(placed)
            kept_from = placed.end
        self._kv_cache.evict(kept_from, self._turns[0].header_end if self._turns else self._kv_cache.mark())
        self._has_header = True
        if not self._turns:
            self._pending_ids = []  # they end a turn that has left

    def _drop_closed(self) -> None:
        """Cut out the questions that were closed after their turn had left."""
        for placed in self._pinned:
            if placed.question.closed:
                self._kv_cache.evict(placed.start, placed.end)
        self._pinned = [placed for placed in self._pinned if not placed.question.closed]

"""The cache's bookkeeping under any order of appending, cutting out, rebasing and going back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge.errors import MemoryBudgetError
from edge.free_slots import FreeSlots
from edge.kv_cache import CacheMark, KVCache, Placement

CAPACITY = 60


@dataclass
class Token:
    """A kept token: its row, the position its key was rotated with, and how far it advances the next one."""

    number: int
    slot: int
    rotated: int
    advance: int


class CacheAgainstList(RuleBasedStateMachine):
    """`KVCache` beside a plain list of the tokens that it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(CAPACITY)
        self.tokens: list[Token] = []
        self.marks = [self.cache.mark()]
        self.cut: set[int] = set()
        self.next_number = 0

    @rule(tokens=st.integers(1, 25), frame_advance=st.none() | st.integers(1, 9))
    def append(self, tokens: int, frame_advance: int | None) -> None:
        """Text advances one position a token; a frame of any size as it likes, at its end."""
        rotated, position = self.cache.rotated_position, self.cache.position
        advance = tokens if frame_advance is None else frame_advance
        if tokens > CAPACITY - len(self.tokens):
            with pytest.raises(MemoryBudgetError):
                self.cache.append(tokens, advance)
            assert self.cache.position == position
            return
        placement = self.cache.append(tokens, advance)
        self.look_back_at_all_kept(placement)
        for i, slot in enumerate(placement.new_slots.tolist()):
            text = Token(self.next_number + i, slot, rotated + i, 1)
            frame = Token(self.next_number + i, slot, rotated, advance if i == tokens - 1 else 0)
            self.tokens.append(text if frame_advance is None else frame)
        self.next_number += tokens
        self.marks.append(self.cache.mark())
        assert self.cache.position == position + advance

    def look_back_at_all_kept(self, placement: Placement) -> None:
        """Spans cover the kept rows in order, and each run's shift puts its keys where the tokens now are."""
        rows = [(slot, run) for first, length, run in placement.spans.tolist() for slot in range(first, first + length)]
        assert [slot for slot, _ in rows] == [token.slot for token in self.tokens]
        position = 0
        for token, (_, run) in zip(self.tokens, rows, strict=True):
            assert token.rotated - (placement.run_shifts[run] + self.cache.shift) == position
            position += token.advance
        assert placement.run_shifts[0] == 0
        assert len(set(placement.run_shifts)) == len(placement.run_shifts)
        assert not set(placement.new_slots.tolist()) & {slot for slot, _ in rows}
        for (slot, length, run), after in zip(placement.spans, placement.spans[1:], strict=False):
            assert (slot + length, run) != (after[0], after[2]), "spans that touch are one"

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        start, end = sorted((data.draw(st.sampled_from(self.marks)) for _ in "ab"), key=lambda mark: mark.token)
        self.cache.evict(start, end)
        self.tokens = [token for token in self.tokens if not start.token <= token.number < end.token]
        self.cut |= set(range(start.token, end.token))

    @rule()
    def rebase(self) -> None:
        self.cache.rebase()
        assert self.cache.rotated_position == self.cache.position

    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        mark = data.draw(st.sampled_from(self.marks))
        if mark.token and mark.token - 1 in self.cut:
            with pytest.raises(ValueError, match="cut out"):
                self.cache.truncate(mark)
            return
        self.cache.truncate(mark)
        self.tokens = [token for token in self.tokens if token.number < mark.token]
        self.cut = {number for number in self.cut if number < mark.token}
        self.marks = [other for other in self.marks if other.token <= mark.token]
        self.next_number = mark.token

    @invariant()
    def counts_agree(self) -> None:
        assert self.cache.length == len(self.tokens)
        assert self.cache.free_tokens == CAPACITY - len(self.tokens)
        assert self.cache.position == sum(token.advance for token in self.tokens)


TestCacheAgainstList = CacheAgainstList.TestCase


class SlotsAgainstSet(RuleBasedStateMachine):
    """`FreeSlots` beside a set."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = FreeSlots(CAPACITY)
        self.free = set(range(CAPACITY))
        self.taken: list[tuple[int, int]] = []

    @rule(count=st.integers(1, 30), after=st.integers(0, CAPACITY))
    def take(self, count: int, after: int) -> None:
        if count > len(self.free):
            with pytest.raises(ValueError, match="free"):
                self.slots.take(count, after)
            return
        ranges = self.slots.take(count, after)
        rows = {row for slot, length in ranges for row in range(slot, slot + length)}
        assert len(rows) == sum(length for _, length in ranges) == count
        assert rows <= self.free
        self.free -= rows
        self.taken += ranges

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.taken:
            slot, length = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
            self.slots.release(slot, length)
            self.free |= set(range(slot, slot + length))

    @invariant()
    def counts_agree(self) -> None:
        assert self.slots.count == len(self.free)


TestSlotsAgainstSet = SlotsAgainstSet.TestCase


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_cache_cannot_be_cut_forward(length: int, ahead: int) -> None:
    cache = KVCache(CAPACITY)
    cache.append(length, length)
    with pytest.raises(ValueError, match="forward"):
        cache.truncate(CacheMark(length + ahead, length))


def test_without_a_cut_the_cache_is_filled_from_the_first_row_on() -> None:
    cache = KVCache(CAPACITY)
    for step in range(5):
        placement = cache.append(7, 7)
        assert placement.new_slots.tolist() == list(range(7 * step, 7 * step + 7))
        assert placement.spans.tolist() == ([[0, 7 * step, 0]] if step else [])


def test_a_ring_that_goes_round_stays_in_two_pieces() -> None:
    cache = KVCache(CAPACITY)
    cache.append(5, 5)
    marks = [cache.mark()]
    for _ in range(1000):
        placement = cache.append(8, 4)
        marks.append(cache.mark())
        assert len(placement.spans) <= 3 and len(placement.run_shifts) <= 2
        if cache.free_tokens < 8:
            cache.evict(marks[-7], marks[-6])


def test_growing_token_by_token_lists_the_same_spans_as_listing_anew() -> None:
    grown, listed = KVCache(CAPACITY), KVCache(CAPACITY)
    for _ in range(CAPACITY):
        listed._moved = True
        np.testing.assert_array_equal(grown.append(1, 1).spans, listed.append(1, 1).spans)

"""The cache's two integers under any order of appending, marking and cutting back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge.errors import MemoryBudgetError
from edge.kv_cache import CacheMark, KVCache

CAPACITY = 100


class CacheAgainstList(RuleBasedStateMachine):
    """`KVCache` beside a plain list of the rows that it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(CAPACITY)
        self.rows: list[int] = []
        self.marks: list[tuple[CacheMark, int]] = []

    @rule(tokens=st.integers(0, 40), positions=st.integers(0, 40))
    def append(self, tokens: int, positions: int) -> None:
        before = self.cache.mark()
        if tokens > CAPACITY - len(self.rows):
            with pytest.raises(MemoryBudgetError):
                self.cache.append(tokens, positions)
            assert self.cache.mark() == before
            return
        assert self.cache.append(tokens, positions) == len(self.rows)
        self.rows += [before.position] * tokens
        assert self.cache.position == before.position + positions

    @rule()
    def mark(self) -> None:
        self.marks.append((self.cache.mark(), len(self.rows)))

    @rule(data=st.data())
    def cut_back(self, data: st.DataObject) -> None:
        usable = [i for i, (mark, _) in enumerate(self.marks) if mark.length <= self.cache.length]
        usable = [i for i in usable if self.marks[i][0].position <= self.cache.position]
        if usable:
            mark, rows = self.marks[data.draw(st.sampled_from(usable))]
            self.cache.truncate(mark)
            del self.rows[rows:]
            assert self.cache.position == mark.position

    @invariant()
    def rows_agree(self) -> None:
        assert self.cache.length == len(self.rows)
        assert self.cache.free_tokens == CAPACITY - len(self.rows)


TestCacheAgainstList = CacheAgainstList.TestCase


@given(st.integers(0, 50), st.integers(1, 50))
def test_a_cache_cannot_be_cut_forward(length: int, ahead: int) -> None:
    cache = KVCache(CAPACITY)
    cache.append(length, length)
    with pytest.raises(ValueError, match="forward"):
        cache.truncate(CacheMark(length + ahead, length))

"""Where the KV cache's tokens are, which of them are kept, and at which position the next one goes.

Owns integers only; the rows themselves live in a backend. The conversation is a tape that grows at its end. Stretches
are cut out of it, which frees their rows and moves everything behind them to earlier positions. No cached key is
touched for that: each stretch remembers its *shift*, the position that its keys were rotated with minus the position
that it has now, and the attention operator turns the query by the difference of two shifts instead.

Never to be mixed up: a *slot* is a row of the cache; a *position* is a rotary one. A frame takes many slots and few
positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edge.errors import MemoryBudgetError
from edge.free_slots import FreeSlots

_FIRST_SPANS = 64


@dataclass(frozen=True)
class CacheMark:
    """A place on the tape, between two tokens; it never moves.

    Attributes:
      token: tokens in front of it, those counted that have been cut out.
      position: positions in front of it, counted likewise.
    """

    token: int
    position: int

    def behind(self, tokens: int, positions: int) -> CacheMark:
        """The place so much further on."""
        return CacheMark(self.token + tokens, self.position + positions)


@dataclass(frozen=True)
class Placement:
    """Where new tokens go, and what they look back at.

    Attributes:
      new_slots: (T,) int32.
      spans: (S, 3) int32: slot, length, run of the tokens before them, in the order of the conversation.
      run_shifts: by run: positions by which the query is turned further for its keys. Run 0 is never turned.
    All are read-only and valid until the cache changes again.
    """

    new_slots: np.ndarray
    spans: np.ndarray
    run_shifts: tuple[int, ...]


@dataclass
class _Stretch:
    """Tokens that lie side by side on the tape and have moved by the same distance.

    Attributes:
      position: where its first token is now, with nothing missing in front of it.
      shift: rotated position minus present position, of each of its tokens.
      ranges: (slot, length), in order.
    """

    start: CacheMark
    end: CacheMark
    position: int
    shift: int
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def split(self, mark: CacheMark) -> _Stretch:
        """Keep what is in front of `mark`; return what is behind it."""
        left = mark.token - self.start.token
        behind = _Stretch(mark, self.end, self.position + mark.position - self.start.position, self.shift)
        self.end = mark
        ranges, self.ranges = self.ranges, []
        for slot, length in ranges:
            here = min(left, length)
            if here:
                self.ranges.append((slot, here))
            if here < length:
                behind.ranges.append((slot + here, length - here))
            left -= here
        return behind


class KVCache:
    """A cache of fixed capacity: append at the end, cut out anywhere, go back to an earlier mark.

    Attributes:
      length: rows in use.
      position: rotary position of the next token if nothing had ever been cut out; what the model sees.
      shift: what is added to it when the next token is rotated.
    """

    def __init__(self, capacity_tokens: int) -> None:
        """`capacity_tokens`: rows allocated, once, for each layer."""
        self.capacity_tokens = capacity_tokens
        self.position = 0
        self.shift = 0
        self._free = FreeSlots(capacity_tokens)
        self._end = CacheMark(0, 0)
        self._stretches: list[_Stretch] = []
        self._slot_numbers = np.arange(capacity_tokens, dtype=np.int32)
        self._spans = np.zeros((_FIRST_SPANS, 3), np.int32)
        self._span_count = 0
        self._run_shifts: tuple[int, ...] = (0,)
        self._unlisted: list[tuple[int, int]] = []  # ranges at the end of the tape that the spans lack
        self._moved = False  # the spans must be listed anew

    @property
    def length(self) -> int:
        return self.capacity_tokens - self._free.count

    @property
    def free_tokens(self) -> int:
        return self._free.count

    @property
    def rotated_position(self) -> int:
        """The position that the next token is rotated with."""
        return self.position + self.shift

    def mark(self) -> CacheMark:
        """The end of the tape."""
        return self._end

    def append(self, tokens: int, positions: int) -> Placement:
        """Take rows for the next `tokens` tokens and advance by `positions`.

        Raises:
          MemoryBudgetError: fewer rows are free. Nothing has changed then.

        Cost: a few microseconds; proportional to the number of spans after a cut, else constant.
        """
        if tokens > self.free_tokens:
            raise MemoryBudgetError(
                f"The KV cache has {self.free_tokens} of {self.capacity_tokens} tokens free, {tokens} are needed",
                hint="Use a smaller `--max-reply-tokens`, or ask shorter questions",
            )
        self._list_spans()
        tail = self._tail()
        ranges = self._free.take(tokens, after=_end_of(self._stretches))
        tail.ranges += ranges
        _join_last(tail.ranges, len(ranges))
        self._unlisted = ranges
        self._end = tail.end = self._end.behind(tokens, positions)
        self.position += positions
        return Placement(self._slots_of(ranges), self._spans[: self._span_count], self._run_shifts)

    def evict(self, start: CacheMark, end: CacheMark) -> None:
        """Cut out the tokens between two marks; their rows are free, and everything behind them moves up.

        Cost: proportional to the number of stretches, of which there are a few. No cache memory is touched.
        """
        self._split(start)
        self._split(end)
        kept, cut_positions = [], 0
        for stretch in self._stretches:
            if start.token <= stretch.start.token < end.token:
                cut_positions += stretch.end.position - stretch.start.position
                self._release(stretch)
                continue
            stretch.position -= cut_positions
            stretch.shift += cut_positions
            kept.append(stretch)
        self._stretches = kept
        self.position -= cut_positions
        self.shift += cut_positions
        self._moved = True

    def rebase(self) -> None:
        """Rotate the next tokens with their present position, so that angles stay small; older keys stay put."""
        self._moved = self._moved or self.shift != 0
        self.shift = 0

    def truncate(self, mark: CacheMark) -> None:
        """Forget everything appended since `mark` was taken.

        Raises:
          ValueError: it lies ahead, or what was there has been cut out.
        """
        if mark.token > self._end.token or mark.position > self._end.position:
            raise ValueError(f"cannot go forward from {self._end} to {mark}")
        self._split(mark)
        kept = [stretch for stretch in self._stretches if stretch.start.token < mark.token]
        if (kept[-1].end.token if kept else 0) != mark.token:
            raise ValueError(f"what was in front of {mark} has been cut out")
        for stretch in self._stretches[len(kept) :]:
            self._release(stretch)
        self._stretches = kept
        self._end = mark
        self.position, self.shift = 0, 0
        if kept:
            last = kept[-1]
            last.end = mark
            self.position, self.shift = last.position + mark.position - last.start.position, last.shift
        self._moved = True

    def _release(self, stretch: _Stretch) -> None:
        for slot, length in stretch.ranges:
            self._free.release(slot, length)

    def _split(self, mark: CacheMark) -> None:
        """Let no stretch reach across `mark`."""
        for index, stretch in enumerate(self._stretches):
            if stretch.start.token < mark.token < stretch.end.token:
                self._stretches.insert(index + 1, stretch.split(mark))
                return

    def _tail(self) -> _Stretch:
        """The stretch that the next tokens belong to."""
        last = self._stretches[-1] if self._stretches else None
        if last is None or last.end.token != self._end.token or last.shift != self.shift:
            last = _Stretch(self._end, self._end, self.position, self.shift)
            self._stretches.append(last)
        return last

    def _slots_of(self, ranges: list[tuple[int, int]]) -> np.ndarray:
        parts = [self._slot_numbers[slot : slot + length] for slot, length in ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self._slot_numbers[:0]])

    def _list_spans(self) -> None:
        """Bring the spans up to the end of the tape."""
        if not self._moved:
            for slot, length in self._unlisted:
                self._add_span(slot, length, 0)
        else:
            self._span_count = 0
            runs = {0: 0}
            for stretch in self._stretches:
                run = runs.setdefault(stretch.shift - self.shift, len(runs))
                for slot, length in stretch.ranges:
                    self._add_span(slot, length, run)
            self._run_shifts = tuple(runs)
        self._unlisted, self._moved = [], False

    def _add_span(self, slot: int, length: int, run: int) -> None:
        if self._span_count:
            last = self._spans[self._span_count - 1]
            if last[2] == run and last[0] + last[1] == slot:
                last[1] += length
                return
        if self._span_count == len(self._spans):
            self._spans = np.concatenate([self._spans, np.zeros_like(self._spans)])
        self._spans[self._span_count] = (slot, length, run)
        self._span_count += 1


def _end_of(stretches: list[_Stretch]) -> int:
    """The slot behind the newest row."""
    for stretch in reversed(stretches):
        if stretch.ranges:
            slot, length = stretch.ranges[-1]
            return slot + length
    return 0


def _join_last(ranges: list[tuple[int, int]], count: int) -> None:
    """Join the first of the last `count` ranges with the one in front of it if they touch."""
    index = len(ranges) - count
    if count and index > 0 and ranges[index - 1][0] + ranges[index - 1][1] == ranges[index][0]:
        slot, length = ranges[index - 1]
        ranges[index - 1 : index + 1] = [(slot, length + ranges[index][1])]

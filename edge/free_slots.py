"""Which rows of a fixed table are free: sorted ranges, taken in ring order.

Knows nothing of what the rows hold.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class FreeSlots:
    """The free rows of `capacity`, as disjoint ranges that never touch.

    Attributes:
      count: free rows.
    """

    def __init__(self, capacity: int) -> None:
        self._starts = [0] if capacity else []
        self._ends = [capacity] if capacity else []
        self.count = capacity

    def take(self, count: int, after: int) -> list[tuple[int, int]]:
        """Take `count` rows: those behind row `after` first, then from the lowest on.

        Returns:
          (slot, length) of each range, in the order of use.

        Raises:
          ValueError: fewer are free.
        """
        if count > self.count:
            raise ValueError(f"{count} rows wanted, {self.count} are free")
        self.count -= count
        taken = []
        index = bisect_right(self._ends, after)
        while count:
            if index == len(self._starts):
                index = 0
            start = self._starts[index]
            length = min(count, self._ends[index] - start)
            taken.append((start, length))
            count -= length
            if start + length == self._ends[index]:
                del self._starts[index], self._ends[index]
            else:
                self._starts[index] += length
        return taken

    def release(self, slot: int, length: int) -> None:
        """Give back rows that were taken."""
        self.count += length
        end = slot + length
        index = bisect_left(self._starts, slot)
        joins_left = index > 0 and self._ends[index - 1] == slot
        joins_right = index < len(self._starts) and self._starts[index] == end
        if joins_left and joins_right:
            self._ends[index - 1] = self._ends.pop(index)
            del self._starts[index]
        elif joins_left:
            self._ends[index - 1] = end
        elif joins_right:
            self._starts[index] = slot
        else:
            self._starts.insert(index, slot)
            self._ends.insert(index, end)

"""Where the KV cache's tokens are and which position comes next.

Owns two different integers and never mixes them: `length` counts occupied rows (slots), `position` is the rotary
position of the next token; a frame takes many slots and few positions. The rows themselves live in a backend.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.errors import MemoryBudgetError


@dataclass(frozen=True)
class CacheMark:
    """A state that the cache can return to."""

    length: int
    position: int


class KVCache:
    """An append-only cache of fixed capacity that can be cut back to an earlier mark.

    Args:
      capacity_tokens: rows allocated, once, for each layer.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self.position = 0

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.length

    def mark(self) -> CacheMark:
        """The present state, to come back to with `truncate`."""
        return CacheMark(self.length, self.position)

    def append(self, tokens: int, positions: int) -> int:
        """Take the next `tokens` rows and advance by `positions`; return the first row's slot.

        Raises:
          MemoryBudgetError: fewer rows are free. Nothing has changed then.
        """
        if tokens > self.free_tokens:
            raise MemoryBudgetError(
                f"The KV cache has {self.free_tokens} of {self.capacity_tokens} tokens free, {tokens} are needed",
                hint="Use a smaller window",
            )
        slot = self.length
        self.length += tokens
        self.position += positions
        return slot

    def truncate(self, mark: CacheMark) -> None:
        """Forget everything appended since `mark` was taken."""
        if mark.length > self.length or mark.position > self.position:
            raise ValueError(f"cannot go forward from {self.mark()} to {mark}")
        self.length, self.position = mark.length, mark.position

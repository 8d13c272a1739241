"""What the programs of one launch read and write: nothing outside their arrays, and nothing that another one writes.

On a device the programs of a launch run in any order and at the same time; the interpreter runs them one after the
other, which hides both faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MANY = -1


class Program(NamedTuple):
    """One point of the grid, and its number from 1."""

    place: tuple[int, int, int]
    number: int


class WatchedMemory:
    """The memory of one launch.

    Args:
      kernel: its name, for what is said. blocks: (address, bytes) of every array it may touch.
    """

    def __init__(self, kernel: str, blocks: Sequence[tuple[int, int]]) -> None:
        self.kernel = kernel
        known = sorted(set(blocks))
        self._starts = np.array([start for start, _ in known], np.uint64)
        self._sizes = np.array([size for _, size in known], np.uint64)
        # For each byte at which an element starts: who wrote it, and who read it (0 nobody, MANY several).
        self._writers = [np.zeros(size, np.int32) for _, size in known]
        self._readers = [np.zeros(size, np.int32) for _, size in known]

    def read(self, addresses: np.ndarray, mask: np.ndarray, width: int, program: Program) -> None:
        """`program` reads elements of `width` bytes where `mask` says so."""
        for block, at in self._places(addresses, mask, width, program, "reads"):
            writers, readers = self._writers[block], self._readers[block]
            others = writers[at]
            if ((others != 0) & (others != program.number)).any():
                self._race(program, "reads")
            before = readers[at]
            readers[at] = np.where((before == 0) | (before == program.number), program.number, MANY)

    def write(self, addresses: np.ndarray, mask: np.ndarray, width: int, program: Program) -> None:
        """`program` writes elements of `width` bytes where `mask` says so."""
        for block, at in self._places(addresses, mask, width, program, "writes"):
            for users in (self._writers[block], self._readers[block]):
                others = users[at]
                if ((others != 0) & (others != program.number)).any():
                    self._race(program, "writes")
            self._writers[block][at] = program.number

    def _places(
        self, addresses: np.ndarray, mask: np.ndarray, width: int, program: Program, what: str
    ) -> list[tuple[int, np.ndarray]]:
        """Offsets of the accessed elements, by block."""
        wanted = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))
        wanted = wanted[np.broadcast_to(mask, wanted.shape).astype(bool)].astype(np.uint64)
        if not wanted.size:
            return []
        if not len(self._starts):
            raise AssertionError(f"kernel `{self.kernel}`, program {program.place}: {what} memory without any array")
        block = np.maximum(np.searchsorted(self._starts, wanted, "right").astype(np.int64) - 1, 0)
        offsets = wanted - self._starts[block]  # wraps to something huge below the first block
        outside = (offsets > self._sizes[block]) | (offsets + np.uint64(width) > self._sizes[block])
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            raise AssertionError(
                f"kernel `{self.kernel}`, program {program.place}: {what} {width} bytes at offset "
                f"{int(wanted[first]) - int(self._starts[block[first]])} of an array of "
                f"{int(self._sizes[block[first]])} bytes ({int(outside.sum())} accesses like it)"
            )
        return [(int(one), offsets[block == one].astype(np.int64)) for one in np.unique(block)]

    def _race(self, program: Program, what: str) -> None:
        raise AssertionError(
            f"kernel `{self.kernel}`: program {program.place} {what} memory that another program of the same launch "
            "uses too, and one of them writes it: the order is not defined"
        )

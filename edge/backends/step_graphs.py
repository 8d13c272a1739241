"""Which runs of one token are recorded as a CUDA graph, and under which number.

Owns numbers only: ONNX Runtime records a run, keeps the graph, and runs it again for the same number. A graph repeats
the launches of the run that it was recorded from, addresses and grids included, so a number stands for everything that
these depend on.

Why one token only: behind ONNX Runtime a launch costs the CPU several microseconds, and a step of a 3B has about 500 of
them. A decode step's own work on a large GPU takes less than that, a turn's more, and then the CPU is ahead anyway.
"""

from __future__ import annotations

from collections.abc import Hashable

NO_GRAPH = -1
"""ONNX Runtime's number of runs that are neither recorded nor repeated."""
MOST_GRAPHS = 64
"""A graph is kept as long as its session. A stream needs a few: one for each number of runs that its window has."""


class StepGraphs:
    """Gives the same number for the same key, and `NO_GRAPH` once there are too many.

    Args:
      most: how many there may be; 0 records nothing.
    """

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self._most = most
        self._numbers: dict[Hashable, int] = {}

    def has(self, key: Hashable) -> bool:
        """Whether a graph with this key may have been recorded."""
        return key in self._numbers

    def number(self, key: Hashable) -> int:
        """The number of the graph that runs with `key` share.

        Args:
          key: everything that the launches depend on: sizes and addresses of what a run reads and writes.
        """
        if key not in self._numbers and len(self._numbers) < self._most:
            self._numbers[key] = len(self._numbers) + 1
        return self._numbers.get(key, NO_GRAPH)

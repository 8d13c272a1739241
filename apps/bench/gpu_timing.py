"""Timing on a GPU: calls are recorded as one graph, so that none of the processor's time is in it, and the device's
events stand around it.

Owns graphs and events. Knows nothing of what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.gpu import DeviceArray, Gpu

Call = Callable[[int], DeviceArray]  # puts the work on a stream; the result is the same array each time


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
      working_set_bytes: memory that a case goes through, several times the L2 of any GPU.
      warm_up_s: of copies before anything is timed, for the clocks of an idle GPU are low. repeats: timed rounds.
      same_runs: runs that must give the same bits. side_by_side: streams in the cases that fill the chip with them.
    """

    working_set_bytes: int = 1 << 30
    warm_up_s: float = 1.0
    repeats: int = 20
    same_runs: int = 200
    side_by_side: int = 8

    def copies_of(self, size: int) -> int:
        """How many arrays of `size` bytes make the working set."""
        return max(1, -(-self.working_set_bytes // max(1, size)))


SMALL_EFFORT = Effort(1, 0.0, 1, 2, 2)


def time_us(gpu: Gpu, streams: Sequence[int], calls: Sequence[Call], repeats: int) -> float:
    """Microseconds of one call: the median over rounds of a graph that makes each call once.

    Args:
      streams: calls are put on them in turns; those of one stream follow each other, the streams run side by side.
    """
    for index, call in enumerate(calls):  # outside the graph first: workspaces grow, code is loaded
        call(streams[index % len(streams)])
    for stream in streams:
        gpu.synchronize(stream)
    begin, end = gpu.make("event"), gpu.make("event")
    graph = _recorded(gpu, streams, calls, begin, end)
    found = []
    for _ in range(repeats + 1):
        gpu.record(begin, streams[0])
        gpu.run_graph(graph, streams[0])
        gpu.record(end, streams[0])
        found.append(gpu.elapsed_ms(begin, end) * 1e3 / len(calls))
    for what, handle in (("event", begin), ("event", end), ("graph", graph)):
        gpu.destroy(what, handle)
    return statistics.median(found[1:])


def _recorded(gpu: Gpu, streams: Sequence[int], calls: Sequence[Call], fork: int, join: int) -> int:
    gpu.begin_graph(streams[0])
    gpu.record(fork, streams[0])
    for stream in streams[1:]:
        gpu.wait(stream, fork)
    for index, call in enumerate(calls):
        call(streams[index % len(streams)])
    for stream in streams[1:]:
        gpu.record(join, stream)
        gpu.wait(streams[0], join)
    return gpu.end_graph(streams[0])


def same_bits(gpu: Gpu, stream: int, call: Call, runs: int) -> bool:
    """Whether `runs` runs of a call give the same bytes."""
    first = gpu.numpy(call(stream), stream).tobytes()
    return all(gpu.numpy(call(stream), stream).tobytes() == first for _ in range(runs - 1))


def keep_busy(gpu: Gpu, stream: int, call: Call, seconds: float) -> None:
    """Make a call again and again."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for _ in range(10):
            call(stream)
        gpu.synchronize(stream)

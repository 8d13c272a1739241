"""Where a run's new and cached rows are, as the operators on a GPU read it: once for all layers, from the device.

Owns the table's size and its way to the operators, past ONNX Runtime: a graph that was recorded repeats reads of one
address, so what changes from run to run has to be rewritten there; see kernels/include/streamo_onnxruntime.h.
"""

from __future__ import annotations

import ctypes

from edge import gpu_abi
from edge.backends.base import CacheView
from edge.backends.place import DevicePlace

_FEWEST_SPANS = 64  # a table keeps its size, and a graph its use, while a window grows


class StepTable:
    """The table of one backend's runs.

    Args:
      place: where it lies. stream: that of the runs; None: the device's default stream.
    """

    def __init__(self, place: DevicePlace, stream: int | None) -> None:
        self._place, self._stream = place, stream

    def send(self, view: CacheView, capacity_tokens: int) -> tuple[int, ...]:
        """Write the table of the run that comes next, in the stream's order, and tell the operators of it.

        Returns:
          what the launches of the run depend on in this: address, size, and how often the operators have moved memory.
        """
        from edge.gpu_operations import attention_table

        most_spans = max(_FEWEST_SPANS, 1 << (len(view.spans) - 1).bit_length())
        runs = len(view.run_cos)
        words = attention_table(
            view.new_slots, view.spans, capacity=capacity_tokens, run_count=runs, most_spans=most_spans
        )
        table = self._place.given("attention table", words)
        moves = ctypes.c_int64()
        use_table = gpu_abi.load_library().streamo_onnxruntime_use_table
        _, _, pointer = self._place.address(table)
        gpu_abi.accept(use_table(self._stream, pointer, most_spans, ctypes.byref(moves)))
        return pointer, most_spans, moves.value

"""Where a backend's arrays are: in the host's memory, or on a GPU.

Owns allocation, and the copies that a GPU needs before and after a run. Knows no graph: arrays have the names that
their backend gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from edge.backends.cache_memory import ALIGNMENT_BYTES, Shape, allocate_arrays, array_bytes
from edge.backends.device_logits import DeviceLogits
from edge.gpu_arrays import DeviceArray, contiguous_strides
from edge.memory import available_bytes

if TYPE_CHECKING:
    from edge.gpu import Gpu
    from edge.sampling import Logits

_DEVICE_ALIGNMENT_BYTES = 4 * ALIGNMENT_BYTES
_GRANULE_BYTES = 64 << 10

Array = Union[np.ndarray, DeviceArray]  # noqa: UP007 - evaluated at run time, which Python 3.10 needs spelt so


class HostPlace:
    """Arrays in the host's memory: nothing is ever copied."""

    name = ""

    def address(self, array: Any) -> tuple[str, int, int]:
        """Device, its number and the pointer, as ONNX Runtime binds them."""
        return "cpu", 0, array.ctypes.data

    def allocate(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Zeroed arrays that live as long as any of them.

        Raises:
          MemoryError: they do not fit.
        """
        return dict(zip(shapes, allocate_arrays(list(shapes.values())), strict=True))

    def given(self, name: str, array: Any) -> Array:
        """A run's input where the graph can read it; the caller keeps it until the run is over."""
        return np.ascontiguousarray(array)

    def result(self, name: str, shape: tuple[int, ...]) -> Array:
        """Where a run can write an output of float32."""
        return np.empty(shape, np.float32)

    def logits(self, row: Any) -> Logits:
        """What a run wrote to (1, V), for whoever chooses a token."""
        return row[0]  # type: ignore[no-any-return]

    def rows(self, array: Any, order: np.ndarray | None) -> Any:
        """Rows in another order."""
        return array if order is None else array[order]

    def read(self, array: Any) -> np.ndarray:
        """An array's contents in the host's memory; of a result, valid until it is written again."""
        return array  # type: ignore[no-any-return]

    def write_rows(self, table: Any, rows: np.ndarray, values: np.ndarray) -> None:
        """Write some rows of an allocated array (C, ...)."""
        table[rows] = values

    def row_buffer(self, rows: int, width: int) -> Any:
        """What gathers a run's embeddings: (rows, width) float32."""
        return np.empty((rows, width), np.float32)

    def free_bytes(self) -> int | None:
        return available_bytes()


class DevicePlace:
    """Arrays on a GPU. What a run needs is allocated when a larger one is first needed, and then kept.

    Args:
      gpu, stream: where everything happens, in order.
      device: the GPU as ONNX Runtime calls it: ("cuda", 0).
      host_inputs: names of inputs that the graph reads in the host's memory.
      name: of the device, for messages.
    """

    def __init__(
        self, gpu: Gpu, stream: int | None, device: tuple[str, int], host_inputs: frozenset[str], name: str
    ) -> None:
        self.name, self.gpu, self.stream = name, gpu, stream
        self._device = device
        self._host_inputs = host_inputs
        self._kept: dict[str, DeviceArray] = {}
        self._read_to: dict[int, np.ndarray] = {}

    @property
    def device_number(self) -> int:
        """Of the GPU."""
        return self._device[1]

    def address(self, array: Array) -> tuple[str, int, int]:
        return (*self._device, array.pointer) if isinstance(array, DeviceArray) else ("cpu", 0, array.ctypes.data)

    def allocate(self, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """Zeroed arrays that live as long as any of them.

        Raises:
          MemoryBudgetError: they do not fit.
        """
        aligned = _DEVICE_ALIGNMENT_BYTES
        steps = [-(-array_bytes(shape) // aligned) * aligned for shape in shapes.values()]
        block = self.gpu.empty(max(1, sum(steps)), np.uint8)
        self.gpu.call("fill", block.pointer, 0, block.nbytes, self.stream)
        arrays, pointer = {}, block.pointer
        for (name, (shape, dtype)), step in zip(shapes.items(), steps, strict=True):
            arrays[name] = _view(pointer, tuple(shape), np.dtype(dtype), block.owner)
            pointer += step
        return arrays

    def given(self, name: str, array: Any) -> Array:
        if isinstance(array, DeviceArray):
            return array
        if name in self._host_inputs:
            return np.ascontiguousarray(array)
        there = self._array(name, array.shape, array.dtype)
        self.fill_rows(there, array)
        return there

    def result(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        return self._array(name, shape, np.dtype(np.float32))

    def logits(self, row: DeviceArray) -> DeviceLogits:
        if "token" not in self._kept:
            self.gpu.call("fill", self._array("token", (1,), np.dtype(np.int32)).pointer, 0, 4, self.stream)
        return DeviceLogits(self, row, self._array("token", (1,), np.dtype(np.int32)))

    def rows(self, array: Any, order: np.ndarray | None) -> Any:
        if isinstance(array, np.ndarray):
            return array if order is None else array[order]
        return RowsOnDevice(self, array, np.arange(array.shape[0]) if order is None else order)

    def read(self, array: Any) -> np.ndarray:
        kept = self._read_to.get(array.pointer)
        if kept is None or kept.shape != array.shape or kept.dtype != array.dtype:
            kept = self._read_to[array.pointer] = np.empty(array.shape, array.dtype)
        self.gpu.call("copy", kept.ctypes.data, array.pointer, kept.nbytes, self.stream)
        self.gpu.synchronize(self.stream)
        return kept

    def write_rows(self, table: DeviceArray, rows: np.ndarray, values: np.ndarray) -> None:
        for place, first, count in _stretches(rows):
            self.gpu.write(_rows(table, first, first + count), values[place : place + count], self.stream)

    def fill_rows(self, target: DeviceArray, values: np.ndarray | RowsOnDevice) -> None:
        """Fill an array (n, ...) from the host, or row by row from the device."""
        if not isinstance(values, RowsOnDevice):
            self.gpu.write(target, np.asarray(values, target.dtype), self.stream)
            return
        step = target.strides[0]
        for place, first, count in _stretches(values.order):
            source = values.source.pointer + first * step
            self.gpu.call("copy", target.pointer + place * step, source, count * step, self.stream)

    def row_buffer(self, rows: int, width: int) -> RowBuffer:
        return RowBuffer(self, self._array("", (rows, width), np.dtype(np.float32)))

    def free_bytes(self) -> int | None:
        return self.gpu.facts.free_bytes

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        wanted = max(1, math.prod(shape) * dtype.itemsize)
        kept = self._kept.get(name)
        if kept is None or kept.nbytes < wanted:
            self._kept.pop(name, None)  # freed first
            rounded = -(-wanted // _GRANULE_BYTES) * _GRANULE_BYTES  # a table with a few more rows should find room
            kept = self._kept[name] = self.gpu.empty(rounded, np.uint8)
        return _view(kept.pointer, tuple(shape), dtype, kept.owner)


class RowsOnDevice:
    """Rows of a device array in an order of their own: a frame's visual tokens. Valid until the next frame.

    Looks like a (N, W) array to whoever only slices it, puts it into a `RowBuffer`, or needs it in the host's memory.
    """

    def __init__(self, place: DevicePlace, source: DeviceArray, order: np.ndarray) -> None:
        self.place, self.source, self.order = place, source, order
        self.shape = (len(order), *source.shape[1:])
        self.dtype = source.dtype

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: Any) -> RowsOnDevice:
        return RowsOnDevice(self.place, self.source, self.order[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.place.read(self.source)[self.order]
        return found if dtype is None else found.astype(dtype, copy=False)


class RowBuffer:
    """A (rows, W) array on a device that is filled a few rows at a time, from the host or from the device."""

    def __init__(self, place: DevicePlace, array: DeviceArray) -> None:
        self._place, self._array = place, array

    def __setitem__(self, rows: slice, values: np.ndarray | RowsOnDevice) -> None:
        self._place.fill_rows(_rows(self._array, rows.start, rows.stop), values)

    def __getitem__(self, rows: slice) -> DeviceArray:
        return _rows(self._array, rows.start or 0, rows.stop)


def _view(pointer: int, shape: tuple[int, ...], dtype: np.dtype, owner: Any) -> DeviceArray:
    return DeviceArray(pointer, shape, dtype, contiguous_strides(shape, dtype), owner)


def _rows(array: DeviceArray, first: int, last: int) -> DeviceArray:
    """A part of a contiguous array along its first axis; the same memory."""
    return _view(array.pointer + first * array.strides[0], (last - first, *array.shape[1:]), array.dtype, array.owner)


def _stretches(numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Where consecutive numbers begin, and of each stretch the first number and how many."""
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2 if len(numbers) else 0) != 1)
    lengths = np.diff(np.append(starts, len(numbers)))
    return [(int(s), int(numbers[s]), int(n)) for s, n in zip(starts, lengths, strict=True)]

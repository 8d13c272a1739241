"""A GPU whose memory is the process's own: what `edge.gpu.Gpu` offers to a backend, without a driver or kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge.errors import DeviceLostError
from edge.gpu import DeviceArray
from edge.gpu_arrays import contiguous_strides


class FakeGpu:
    """Takes the place of `edge.gpu.Gpu`.

    Attributes:
      free_bytes: what it says is free. lost: whether it has become unusable.
    """

    def __init__(self, device: int = 0, *, sm: int = 87, name: str = "Orin", free_bytes: int = 8 << 30) -> None:
        self.sm, self.name, self.free_bytes, self.integrated, self.lost = sm, name, free_bytes, True, False
        self.allocated_bytes = 0
        self.on_loss: Callable[[], None] = lambda: None

    @property
    def facts(self) -> Any:
        if self.lost:
            self.on_loss()
            raise DeviceLostError("The GPU is unusable since an earlier error")
        return SimpleNamespace(
            name=self.name, sm=self.sm, free_bytes=self.free_bytes, integrated=self.integrated, memory_bytes=8 << 30
        )

    def make(self, what: str) -> int:
        return 17

    def empty(self, shape: Any, dtype: Any = np.float32) -> DeviceArray:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        size = int(np.prod(sizes)) * kind.itemsize
        block = np.empty(size + 256, np.uint8)
        start = -block.ctypes.data % 256  # as the driver aligns memory
        values = block[start : start + size].view(kind).reshape(sizes)
        values[...] = 85
        self.allocated_bytes += values.nbytes
        return DeviceArray(values.ctypes.data, sizes, kind, contiguous_strides(sizes, kind), values)

    def call(self, name: str, *arguments: Any) -> None:
        first, second, count, _stream = arguments
        _bytes_at(first, count)[...] = second if name == "fill" else _bytes_at(second, count)
        assert name in ("fill", "copy"), name

    def write(self, target: DeviceArray, values: np.ndarray, stream: int | None = None) -> None:
        assert target.is_contiguous and target.nbytes == values.nbytes and target.dtype == values.dtype
        _bytes_at(target.pointer, target.nbytes)[...] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def numpy(self, source: DeviceArray, stream: int | None = None) -> np.ndarray:
        return _bytes_at(source.pointer, source.nbytes).view(source.dtype).reshape(source.shape).copy()

    def synchronize(self, stream: int | None = None) -> None:
        if self.lost:
            self.on_loss()
            raise DeviceLostError("The GPU is unusable since an earlier error")

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeGpu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_at(pointer: int, count: int) -> np.ndarray:
    import ctypes

    return np.frombuffer((ctypes.c_byte * count).from_address(pointer), np.uint8)

"""One GPU and its kernels, without a framework: memory, streams, and a call for each operation.

Owns the device's handle and the memory it gives out. What each operation computes is said in
`kernels/include/streamo_gpu.h`; arrays are DeviceArrays or anything that `gpu_arrays.device_array` takes, but `spans`,
`new_slots` and `window_starts`, which are numpy arrays. Letters as in `native`.

A call puts its work on a stream and returns; `numpy` and `synchronize` wait. Errors are those of `gpu_abi.accept`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge import gpu_abi as abi
from edge.errors import DeviceLostError, KernelError
from edge.gpu_arrays import DeviceArray, contiguous_strides, device_array, device_pointer

__all__ = ["DeviceArray", "Gpu", "GpuFacts", "device_array", "device_count", "device_pointer"]


@dataclass(frozen=True)
class GpuFacts:
    """What a GPU is.

    Attributes:
      name: the driver's. sm: compute capability, 10 * major + minor. kernel_sm: that of the kernels in use.
      multiprocessors: how many. driver_version: CUDA version it supports, e.g. "12.6". integrated: shares the CPU's
        memory. memory_bytes: all. free_bytes: when asked.
    """

    name: str
    sm: int
    kernel_sm: int
    multiprocessors: int
    driver_version: str
    integrated: bool
    memory_bytes: int
    free_bytes: int


def device_count() -> int:
    """How many GPUs there are. DeviceError: no driver, or one that does not work."""
    count = ctypes.c_int32()
    abi.accept(abi.load_library().streamo_gpu_count(ctypes.byref(count)))
    return count.value


class Gpu:
    """A GPU in use. Close it, or use it in a `with` statement; its memory goes with it.

    Args:
      device: its number, from 0. cubin_folder: where the kernels' machine code is; None: in this package.
      on_loss: called when the device turns out to be lost, before the error is raised.
    """

    def __init__(
        self, device: int = 0, *, cubin_folder: Path | str | None = None, on_loss: Callable[[], None] | None = None
    ) -> None:
        self._on_loss = on_loss
        self._handle = ctypes.c_void_p()
        self._library = abi.load_library()
        self._memory: set[int] = set()
        self._workspaces: dict[int, DeviceArray] = {}
        folder = str(abi.cubin_folder() if cubin_folder is None else cubin_folder)
        abi.accept(self._library.streamo_gpu_open(folder.encode(), device, ctypes.byref(self._handle)))

    @property
    def handle(self) -> ctypes.c_void_p:
        """For functions of the library; KernelError if the GPU was closed."""
        if not self._handle:
            raise KernelError("GPU: it was closed")
        return self._handle

    @property
    def facts(self) -> GpuFacts:
        """What the GPU is, and its free memory now."""
        found = abi.GpuFacts()
        self.call("get_facts", ctypes.byref(found))
        version = f"{found.driver_version // 1000}.{found.driver_version % 1000 // 10}"
        return GpuFacts(
            found.name.decode(errors="replace"),
            found.sm,
            found.kernel_sm,
            found.multiprocessors,
            version,
            bool(found.integrated),
            found.memory_bytes,
            found.free_bytes,
        )

    def call(self, name: str, *arguments: Any) -> None:
        """Call `streamo_gpu_<name>` with this GPU and `arguments`."""
        try:
            abi.accept(getattr(self._library, f"streamo_gpu_{name}")(self.handle, *arguments))
        except DeviceLostError:
            if self._on_loss:
                self._on_loss()
            raise

    def load(self, prefix: str | None = None) -> None:
        """Load the machine code of all kernels, or of those whose names start with `prefix`; due before a graph."""
        self.call("load", None if prefix is None else prefix.encode())

    # ------------------------------------------------------------------------------------------------------- memory

    def empty(self, shape: tuple[int, ...] | int, dtype: Any = np.float32) -> DeviceArray:
        """Uninitialised memory, freed with the last array that uses it."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        pointer = ctypes.c_void_p()
        self.call("alloc", max(1, int(np.prod(sizes, dtype=np.int64)) * kind.itemsize), ctypes.byref(pointer))
        address = int(pointer.value or 0)
        self._memory.add(address)
        block = _Block(address)
        weakref.finalize(block, Gpu._free, weakref.ref(self), address)
        return DeviceArray(address, sizes, kind, contiguous_strides(sizes, kind), block)

    def array(self, values: np.ndarray) -> DeviceArray:
        """A copy of `values` on the device."""
        found = self.empty(values.shape, values.dtype)
        self.write(found, values)
        self.synchronize()  # other streams do not wait for the one of this copy
        return found

    def write(self, target: DeviceArray, values: np.ndarray, stream: int | None = None) -> None:
        """Copy host values to a device array of the same size and type."""
        source = np.ascontiguousarray(values)
        if source.nbytes != target.nbytes or source.dtype != target.dtype or not target.is_contiguous:
            raise KernelError(f"copy: expected {target.dtype} {target.shape}, found {source.dtype} {source.shape}")
        self.call("copy", target.pointer, source.ctypes.data, source.nbytes, stream)

    def numpy(self, source: Any, stream: int | None = None) -> np.ndarray:
        """A device array's values, once the stream's work is done."""
        array = device_array(source)
        found = np.empty(array.shape, array.dtype)
        self.call("copy", found.ctypes.data, device_pointer(array), found.nbytes, stream)
        self.synchronize(stream)
        return found

    def synchronize(self, stream: int | None = None) -> None:
        """Wait until the stream's work is done."""
        self.call("synchronize", stream)

    def workspace(self, bytes: int, stream: int | None = None) -> DeviceArray:
        """At least `bytes` of scratch memory; calls on one stream share it, and it grows."""
        known = self._workspaces.get(stream or 0)
        if known is None or known.nbytes < bytes:
            self.synchronize(stream)  # the old one may be in use
            known = self._workspaces[stream or 0] = self.empty(max(bytes, 1), np.uint8)
        return known

    @staticmethod
    def _free(gpu: weakref.ref[Gpu], address: int) -> None:
        owner = gpu()
        if owner is None or not owner._handle or address not in owner._memory:
            return
        owner._memory.discard(address)
        owner._library.streamo_gpu_free(owner._handle, address)

    def launch(self, kernel: str, grid: tuple[int, ...], *arguments: Any, stream: int | None = None) -> None:
        """Run one kernel by name: for benchmarks and tests.

        Args:
          grid: one to three numbers of programs.
          arguments: device arrays, None, ctypes.c_int64, and numbers: an int is 32 bits, a float is a float32.
        """
        values = [_argument(argument) for argument in arguments]
        letters = "".join(_LETTERS[type(value)] for value in values)
        pointers = (ctypes.c_void_p * (len(values) + 1))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_uint32 * 3)(*grid, *(1,) * (3 - len(grid)))
        self.call("launch", kernel.encode(), sizes, letters.encode(), pointers, stream)

    # ------------------------------------------------------------------------------------- streams, events and graphs

    def make(self, what: str) -> int:
        """A new `stream` or `event`; give it to `destroy` in the end."""
        found = ctypes.c_void_p()
        self.call(f"{what}_create", ctypes.byref(found))
        return int(found.value or 0)

    def destroy(self, what: str, handle: int) -> None:
        """End a `stream`, an `event` or a `graph`."""
        self.call(f"{what}_destroy", handle)

    def record(self, event: int, stream: int | None = None) -> None:
        """Mark the point that the stream's work has reached."""
        self.call("event_record", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What the stream is given from now on comes after what the event marks; in a graph, on a branch of its own."""
        self.call("stream_wait", stream, event)

    def elapsed_ms(self, begin: int, end: int) -> float:
        """Milliseconds between two recorded events; waits for them."""
        found = ctypes.c_float()
        self.call("event_elapsed", begin, end, ctypes.byref(found))
        return found.value

    def begin_graph(self, stream: int) -> None:
        """From now on, what the stream is given is recorded and not done."""
        self.call("graph_begin", stream)

    def end_graph(self, stream: int) -> int:
        """What was recorded, ready to run."""
        found = ctypes.c_void_p()
        self.call("graph_end", stream, ctypes.byref(found))
        return int(found.value or 0)

    def run_graph(self, graph: int, stream: int | None = None) -> None:
        """Do what was recorded."""
        self.call("graph_launch", graph, stream)

    # -------------------------------------------------------------------------------------------------------- closing

    def close(self) -> None:
        """Free everything that is left and give the GPU back."""
        if not self._handle:
            return
        self._workspaces.clear()
        for address in list(self._memory):
            self._library.streamo_gpu_free(self._handle, address)
        self._memory.clear()
        self._library.streamo_gpu_close(self._handle)
        self._handle = ctypes.c_void_p()

    def __enter__(self) -> Gpu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


_LETTERS = {ctypes.c_void_p: "p", ctypes.c_int32: "i", ctypes.c_int64: "l", ctypes.c_float: "f"}


def _argument(value: Any) -> Any:
    """A kernel's argument as the C type that it takes."""
    if isinstance(value, ctypes._SimpleCData):
        return value
    if isinstance(value, (int, np.integer)):
        return ctypes.c_int32(int(value))
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_void_p(device_pointer(value))


class _Block:
    """Memory that a Gpu gave out; when it is forgotten, the memory is freed."""

    def __init__(self, address: int) -> None:
        self.address = address

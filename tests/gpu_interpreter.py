"""GPU kernels on the CPU: Triton's interpreter behind the launcher, with a driver that only pretends (`fake_cuda`).

    fake = FakeCuda(tmp_path); with fake.open() as gpu: ...        everything from the C ABI down to the kernels
    interpret("attend_int8_d128_m16", (2, 1, 4), array, 7, ...)    one kernel, without the launcher

Both hold kernels to what a device would punish or, worse, let pass: accesses outside the arrays that were given, and
two programs of one launch that use the same memory while one of them writes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, by whomever

import numpy as np
import pytest
from gpu_memory import Program, WatchedMemory

from edge.gpu import Gpu

ROOT = Path(__file__).resolve().parent.parent
DRIVER_SOURCE = ROOT / "tests" / "fake_cuda" / "driver.c"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@functools.cache
def _loader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("streamo_gpu_load", ROOT / "kernels" / "gpu" / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gpu_module(name: str) -> ModuleType:
    """The file `name`.py of kernels/gpu."""
    return _loader().gpu_module(name)


def kernel_file(path: Path) -> ModuleType:
    """A file with kernels from elsewhere, as if it were in kernels/gpu."""
    return _loader().kernel_file(path)


@functools.cache
def variants() -> dict[str, Any]:
    """Every kernel by name."""
    return {variant.name: variant for variant in gpu_module("variants").variants()}


# ------------------------------------------------------------------------------------------------- running one kernel

_WIDTHS = {"i32": np.int32, "i64": np.int64, "u64": np.uint64, "fp32": np.float32}
_one_at_a_time = threading.RLock()  # the interpreter has one state for the process


def run_program(variant: Any, grid: Sequence[int], values: Sequence[Any], memory: WatchedMemory | None) -> None:
    """Run a kernel over a grid; `values` are addresses and numbers in the signature's order."""
    from triton import language as tl
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpretedFunction, TensorHandle

    if not isinstance(variant.function, InterpretedFunction):
        raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was set")

    arguments = {}
    for (name, kind), value in zip(variant.signature.items(), values, strict=True):
        if name in variant.aligned_arguments and value % 16:
            raise AssertionError(f"kernel `{variant.name}`: argument {name} = {value:#x} is not a multiple of 16")
        pointed = tl.str_to_ty(kind.lstrip("*"), None)
        dtype = tl.pointer_type(pointed) if kind.startswith("*") else pointed
        width = np.uint64 if kind.startswith("*") else _WIDTHS[kind]
        arguments[name] = tl.tensor(TensorHandle(np.array([value], width), dtype), dtype)
    with _one_at_a_time, _watching(memory):
        try:
            variant.function[tuple(grid)](**arguments, **variant.constants)
        except InterpreterError as error:
            raise error.__cause__ or error from None


@contextlib.contextmanager
def _watching(memory: WatchedMemory | None) -> Iterator[None]:
    """Every load and store of the interpreter is shown to `memory` first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    if memory is None:
        yield
        return

    def program() -> Program:
        x, y, z = builder.grid_idx
        return Program((x, y, z), 1 + x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z))

    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        memory.read(pointers.data, mask.data, _bytes_of(pointers), program())
        return load(pointers, mask, *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.write(pointers.data, mask.data, _bytes_of(pointers), program())
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _bytes_of(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def interpret(name: str, grid: Sequence[int], *values: Any) -> None:
    """Run the kernel called `name` on numpy arrays (changed in place), None and numbers, in the signature's order."""
    variant = variants()[name]
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    for array in arrays:
        assert array.flags.c_contiguous, f"kernel `{name}`: an array is not contiguous"
    memory = WatchedMemory(name, [(array.ctypes.data, array.nbytes) for array in arrays])
    plain = [value.ctypes.data if isinstance(value, np.ndarray) else value or 0 for value in values]
    run_program(variant, grid, plain, memory)


def aligned_array(values: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes, as device memory does."""
    values = np.ascontiguousarray(values)
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    found = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


# ------------------------------------------------------------------------------------------------ the driver's pretence

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)
_LETTERS = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}


def fake_archive(sm: int = 87, cuda_version: int = 12090, chosen: Sequence[Any] | None = None) -> bytes:
    """An archive whose machine code only says which kernel it is; of all kernels, or of the `chosen` variants."""
    archive = gpu_module("archive")
    kernels = []
    for variant in variants().values() if chosen is None else chosen:
        symbol = variant.function.__name__
        code = f"FAKECUBIN {variant.name} {variant.letters or '-'} {symbol}\0".encode()
        kernels.append(
            archive.ArchivedKernel(variant.name, symbol, variant.letters, variant.num_warps, 1024, 32, 0, code)
        )
    return archive.archive_bytes(sm, cuda_version, kernels)


@functools.cache
def _driver_bytes() -> bytes:
    """The driver, compiled once for the process."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "driver.so"
        flags = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["gcc", *flags, str(DRIVER_SOURCE), "-o", str(target)], check=True)
        return target.read_bytes()


class FakeCuda:
    """A driver of its own, with a folder of archives; nothing that happens to it reaches another one.

    Args:
      folder: where its files go. chosen: variants in the archive, None for all. watch: hold kernels to their arrays.
      settings: see `settings` in fake_cuda/driver.c, e.g. sm=90.

    Attributes:
      host_arrays: what a launch may use besides this driver's memory, where a caller hands over arrays of its own.
    """

    def __init__(self, folder: Path, *, chosen: Sequence[Any] | None = None, watch: bool = True, **settings: int):
        self.library_path = folder / "libcuda_fake.so"
        self.library_path.write_bytes(_driver_bytes())
        self.cubins = folder / "cubins"
        self.cubins.mkdir(exist_ok=True)
        sm = settings.get("sm", 87)
        (self.cubins / f"sm_{sm}.cubins").write_bytes(fake_archive(sm, chosen=chosen))
        self._by_name = variants() if chosen is None else {variant.name: variant for variant in chosen}
        self._library = ctypes.CDLL(str(self.library_path))
        self._library.fake_cuda_get.restype = ctypes.c_longlong
        self._callback = _LAUNCH(self._launch)
        self._library.fake_cuda_on_launch(self._callback)
        self._watch = watch
        self.host_arrays: list[np.ndarray] = []
        self.failures: list[BaseException] = []
        self.launched: list[tuple[str, tuple[int, ...]]] = []
        self.on_launch: Callable[[str, tuple[int, ...], list[Any]], None] | None = None
        self.set(**settings)

    def set(self, **settings: int) -> None:
        """Change facts of the device, or plan a fault."""
        for name, value in settings.items():
            self._library.fake_cuda_set(name.encode(), ctypes.c_longlong(value))

    def __getitem__(self, name: str) -> int:
        return int(self._library.fake_cuda_get(name.encode()))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[FakeCuda]:
        """Whoever opens a GPU meanwhile, in this process or one that it starts, gets this driver and its kernels."""
        names = {"STREAMO_CUDA_DRIVER": str(self.library_path), "STREAMO_EDGE_CUBINS": str(self.cubins)}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        try:
            yield self
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        self.check()

    @contextlib.contextmanager
    def open(self, device: int = 0) -> Iterator[Gpu]:
        """A GPU on this driver; fails if a kernel failed, or wrote where it must not."""
        with self.in_use(), Gpu(device) as gpu:
            yield gpu
            self.check()
        assert self["faults"] == 0, "a kernel or a copy wrote behind a block of memory"

    def check(self) -> None:
        """Raise what the first kernel that failed raised."""
        if self.failures:
            raise self.failures[0]

    def _launch(self, name: bytes, grid: Any, threads: int, shared: int, parameters: Any) -> int:
        try:
            self._run(name.decode(), (grid[0], grid[1], grid[2]), threads, parameters)
        except BaseException as error:  # noqa: BLE001 - it would end in C; `check` raises it
            self.failures.append(error)
            return 1
        return 0

    def _run(self, name: str, grid: tuple[int, int, int], threads: int, parameters: Any) -> None:
        variant = self._by_name[name]
        assert threads == 32 * variant.num_warps, f"kernel `{name}`: {threads} threads"
        values = [
            _LETTERS[letter].from_address(parameters[index]).value for index, letter in enumerate(variant.letters)
        ]
        self.launched.append((name, grid))
        if self.on_launch is not None:
            self.on_launch(name, grid, values)
        self._compute(variant, grid, values)

    def _compute(self, variant: Any, grid: tuple[int, int, int], values: list[Any]) -> None:
        run_program(variant, grid, values, self._blocks_of(variant, values) if self._watch else None)

    def block_of(self, pointer: int) -> tuple[int, int] | None:
        """Start and size of the block of this driver's memory that holds an address."""
        start, size = ctypes.c_uint64(), ctypes.c_uint64()
        known = self._library.fake_cuda_block(ctypes.c_uint64(pointer), ctypes.byref(start), ctypes.byref(size))
        return (start.value, size.value) if known else None

    def _blocks_of(self, variant: Any, values: Sequence[Any]) -> WatchedMemory | None:
        """The memory that a launch was given; None where some of it is not this driver's (a caller's host arrays)."""
        blocks = []
        for letter, value in zip(variant.letters, values, strict=True):
            if letter != "p" or value == 0:
                continue
            if block := self.block_of(value):
                blocks.append(block)
                continue
            arrays = [(array.ctypes.data, array.nbytes) for array in self.host_arrays]
            found = [block for block in arrays if block[0] <= value < sum(block)]
            if not found:
                return None
            blocks += found
        return WatchedMemory(variant.name, blocks)


class IdleCuda(FakeCuda):
    """Kernels are launched, checked and not run: for what happens around them."""

    def _compute(self, variant: Any, grid: tuple[int, int, int], values: list[Any]) -> None:
        pass

"""What this machine can do at most: read memory, multiply integers, multiply floats.

Owns the measurement; the loops themselves are in `kernels/src/common/peaks*.cpp`, one for each instruction set.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge import kernels_abi, native

READ_BYTES = 1 << 30
LEAST_MS = 20.0
KINDS = {"int8_gops": 0, "f32_gops": 1}


def measure(threads: Sequence[int], rounds: int, read_bytes: int = READ_BYTES) -> dict[str, dict[str, float]]:
    """The best of `rounds` measurements by number of threads: `read_gbs`, `int8_gops`, `f32_gops`."""
    library = _library()
    memory = np.empty(read_bytes, np.uint8)
    memory.fill(1)  # pages that were never written are one and the same
    peaks: dict[str, dict[str, float]] = {str(count): {} for count in threads}
    pools = {count: native.Threads(count) for count in threads}
    try:
        for _ in range(rounds):
            for count, pool in pools.items():
                best = peaks[str(count)]
                _keep(best, "read_gbs", _read(library, memory, pool))
                for name, kind in KINDS.items():
                    _keep(best, name, _arithmetic(library, kind, pool))
    finally:
        for pool in pools.values():
            pool.close()
    return {count: {name: round(value, 2) for name, value in best.items()} for count, best in peaks.items()}


def best_of(*measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The highest of several measurements: other work on the machine only ever lowers them."""
    best: dict[str, dict[str, float]] = {}
    for peaks in measured:
        for count, found in peaks.items():
            for name, value in found.items():
                _keep(best.setdefault(count, {}), name, value)
    return best


def _library() -> Any:
    library = kernels_abi.load_library()
    library.streamo_peak_arithmetic.restype = ctypes.c_double
    library.streamo_peak_arithmetic.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)
    library.streamo_peak_read.restype = ctypes.c_uint64
    library.streamo_peak_read.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return library


def _keep(best: dict[str, float], name: str, value: float) -> None:
    best[name] = max(best.get(name, 0.0), value)


def _read(library: Any, memory: np.ndarray, pool: native.Threads) -> float:
    start = time.perf_counter()
    library.streamo_peak_read(memory.ctypes.data, memory.nbytes, pool.pointer)
    return memory.nbytes / (time.perf_counter() - start) / 1e9


def _arithmetic(library: Any, kind: int, pool: native.Threads) -> float:
    """Billions of operations a second; more rounds until one measurement takes long enough."""
    loops = 10_000
    while True:
        start = time.perf_counter()
        operations = library.streamo_peak_arithmetic(kind, loops, pool.pointer)
        elapsed_s = time.perf_counter() - start
        if elapsed_s * 1e3 >= LEAST_MS:
            return operations / elapsed_s / 1e9
        loops *= 4

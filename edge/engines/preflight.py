"""Whether a build fits into memory and on the disk, told before it starts.

Owns the estimates. They are upper ones by rule of thumb: TensorRT says nothing beforehand, and a build that the
kernel's out-of-memory killer ends says nothing at all.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edge.errors import MemoryBudgetError, OutputError
from edge.memory import available_bytes, bytes_text

HOST_COPIES = 2
"""Of the weights, in the CPU's memory: the parser's, and the serialised engine."""
DEVICE_COPIES = 1
BASE_HOST_BYTES, BASE_DEVICE_BYTES = 1 << 30, 512 << 20
"""Of TensorRT and CUDA themselves."""
SPARE_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class BuildMemory:
    """What building one engine takes, in bytes."""

    host_bytes: int
    device_bytes: int


def build_memory(weights_bytes: int, workspace_bytes: int) -> BuildMemory:
    """About what building an engine with so many bytes of weights takes at its peak."""
    host = HOST_COPIES * weights_bytes + BASE_HOST_BYTES
    return BuildMemory(host, DEVICE_COPIES * weights_bytes + workspace_bytes + BASE_DEVICE_BYTES)


def check_memory(what: str, need: BuildMemory, device_free_bytes: int, *, integrated: bool) -> None:
    """Refuse a build that would not fit.

    Args:
      what: the component's name.
      integrated: whether the GPU and the CPU share one memory; then both needs come out of it.

    Raises:
      MemoryBudgetError: says what is needed and what is free.
    """
    host_free = available_bytes()
    if integrated:
        wanted = need.host_bytes + need.device_bytes
        free = min(device_free_bytes, host_free) if host_free is not None else device_free_bytes
        _require(what, "memory", wanted, free)
        return
    if host_free is not None:
        _require(what, "memory", need.host_bytes, host_free)
    _require(what, "GPU memory", need.device_bytes, device_free_bytes)


def _require(what: str, kind: str, wanted: int, free: int) -> None:
    if wanted > free:
        raise MemoryBudgetError(
            f"Building the {what} engine takes about {bytes_text(wanted)} of {kind}, {bytes_text(free)} is free",
            hint="Close other programs or add swap, export with `--weights int4`, or try it with `--ignore-memory`",
        )


def check_disk(folder: Path, engine_bytes: int) -> None:
    """Refuse to build what there is no room for.

    Raises:
      OutputError: says what is needed and what is free.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free, wanted = shutil.disk_usage(place).free, engine_bytes + SPARE_DISK_BYTES
    if wanted > free:
        raise OutputError(
            f"An engine takes about {bytes_text(wanted)}, `{place}` has {bytes_text(free)} free",
            hint="Free some space, or choose another folder with `--engines`",
        )

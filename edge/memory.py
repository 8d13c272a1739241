"""How much memory this process can still have, and sizes for people. Allocates nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_bytes() -> int | None:
    """Memory that can be had without swapping, of the machine and of the process's control groups; None if unknown."""
    known = [free for free in (_machine_bytes(), *_group_bytes()) if free is not None]
    return min(known, default=None)


def bytes_text(count: int) -> str:
    """A size for people: `17.9 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def _machine_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _group_bytes(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each limited group (cgroup v2) around the process has left; pages that can be dropped count as free."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        if line.startswith("0::/"):
            group = root / line.removeprefix("0::/")
            for folder in (group, *group.parents):
                if folder == root.parent:
                    return
                free = _left_in(folder)
                if free is not None:
                    yield free


def _left_in(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        droppable = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        return max(0, int(limit) - used + droppable)
    except (OSError, ValueError, IndexError):
        return None

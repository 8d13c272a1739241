"""How much memory the machine can still give. Allocates nothing."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Memory that a new process can have without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None

"""Freed memory, given back to the system.

Owns one call into the C library, where it has it. The allocator keeps freed blocks of some megabytes for later; while
a checkpoint goes through a layer at a time, that would add up to more than the layers themselves.
"""

from __future__ import annotations

import ctypes
import gc


def release_freed_memory() -> None:
    """Give freed memory back. Does nothing where the C library has no such call."""
    gc.collect(0)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""What becomes of a backend whose GPU is lost.

Owns the one exception to giving everything back.
"""

from __future__ import annotations

import ctypes


def keep_for_ever(backend: object | None) -> None:
    """Give nothing back to a device that is lost: destructors would fail, and end the process their own way."""
    if backend is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))

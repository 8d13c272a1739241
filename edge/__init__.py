"""streamo-edge: an on-device runtime for streaming video language models.

Importing this package loads nothing but the standard library; each name below loads what it needs when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge.bundle import Bundle, open_bundle
    from edge.device_frames import Nv12Frame
    from edge.errors import BackendError, BundleError, EdgeError, FrameError, QuestionError, SourceError
    from edge.sampling import Sampling
    from edge.session import StreamSession
    from edge.turn import Turn, TurnState

__version__ = "0.1.0"

_HOME = {
    "Bundle": "edge.bundle",
    "open_bundle": "edge.bundle",
    "Nv12Frame": "edge.device_frames",
    "BackendError": "edge.errors",
    "BundleError": "edge.errors",
    "EdgeError": "edge.errors",
    "FrameError": "edge.errors",
    "QuestionError": "edge.errors",
    "SourceError": "edge.errors",
    "Sampling": "edge.sampling",
    "StreamSession": "edge.session",
    "Turn": "edge.turn",
    "TurnState": "edge.turn",
}

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "EdgeError",
    "FrameError",
    "Nv12Frame",
    "QuestionError",
    "Sampling",
    "SourceError",
    "StreamSession",
    "Turn",
    "TurnState",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

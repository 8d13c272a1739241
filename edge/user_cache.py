"""Where this user keeps what can be made again: bundles of the demonstration, passed checks, engines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache_folder() -> Path:
    """The folder; it exists, unless nothing can be written at all."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamo-edge"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"streamo-edge-{os.getuid()}"
    return base

"""Where this user keeps what can be made again: bundles of the demonstration, passed checks, the TensorRT plugin."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def own_cache_folder() -> Path:
    """The folder in the user's own cache, whether it is there or not: for what nobody else may have put there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamo-edge"


def user_cache_folder() -> Path:
    """The same, and it exists; where it cannot, one among the temporary files that may not."""
    base = own_cache_folder()
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"streamo-edge-{os.getuid()}"
    return base

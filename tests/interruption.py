"""What the tests of interrupted exports share: interrupting one, and comparing two bundles byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def interrupted_export(
    export: Callable[..., object], checkpoint: Path, folder: Path, point: tuple[str, int], **options: Any
) -> Path:
    """Interrupt `export` at (stage, done); returns what it leaves."""

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == point:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, folder, progress=stop, **options)
    (leftover,) = folder.parent.iterdir()
    return leftover


def assert_same(one: Path, other: Path) -> None:
    """Both folders have the same files with the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name

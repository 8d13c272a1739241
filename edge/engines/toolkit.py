"""The `tensorrt` Python package: whether it is there, which version it is, and what it has to say.

Owns its import, the differences between versions, and its messages. Knows no bundle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge.errors import EngineError

OLDEST = (10, 3)
"""The first whose plugins can update a cache in place; JetPack 6.2 has it."""
NEWEST_MAJOR = 11
MOST_MESSAGES = 6
"""Kept for an error: the first, which name the cause, and as many of the last, which say what came of it."""


@dataclass(frozen=True)
class TensorRT:
    """The imported package.

    Attributes:
      version: (major, minor, patch).
    """

    module: Any
    version: tuple[int, int, int]

    @property
    def text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))

    @property
    def network_flags(self) -> int:
        """For `create_network`: types as the graph says them. From 11 on there is nothing else, and no flag for it."""
        if self.version >= (11,):
            return 0
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def load_tensorrt() -> TensorRT:
    """Import the package.

    Raises:
      EngineError: it is not installed, is broken, or is of a version that this one does not know.
    """
    try:
        import tensorrt
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        said = "is not installed for this Python" if absent else f"cannot be loaded: {error}"
        raise EngineError(
            f"TensorRT {said}",
            hint="On a Jetson use the system's Python with `sudo apt install python3-libnvinfer`, elsewhere "
            "`pip install tensorrt`; see docs/tensorrt.md",
        ) from None
    text = str(getattr(tensorrt, "__version__", ""))
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if not found:
        raise EngineError(
            f"The module `tensorrt` has version {text!r}, expected a number like 10.3.0",
            hint="Install TensorRT again; see docs/tensorrt.md",
        )
    version = (int(found[1]), int(found[2]), int(found[3] or 0))
    if version < OLDEST:
        raise EngineError(
            f"TensorRT should be {OLDEST[0]}.{OLDEST[1]} to {NEWEST_MAJOR}.x, found {text}: its plugins cannot update "
            "a cache in place",
            hint="Use `--backend cpu` here, or JetPack 6.2 or newer",
        )
    if version[0] > NEWEST_MAJOR:
        raise EngineError(
            f"TensorRT should be {OLDEST[0]}.{OLDEST[1]} to {NEWEST_MAJOR}.x, found {text}",
            hint="Install a newer streamo-edge",
        )
    return TensorRT(tensorrt, version)


class Messages:
    """What TensorRT complained about, kept for the error that will follow."""

    def __init__(self) -> None:
        self._errors: list[str] = []

    def add(self, text: str) -> None:
        """Take note of an error."""
        kept = [*self._errors, " ".join(text.split())]
        self._errors = (
            kept if len(kept) <= MOST_MESSAGES else [*kept[: MOST_MESSAGES // 2], *kept[-MOST_MESSAGES // 2 :]]
        )

    def told(self) -> str:
        """All of them in one line, the oldest first, and forget them."""
        text, self._errors = "; ".join(self._errors), []
        return text or "TensorRT gave no reason"


def make_logger(toolkit: TensorRT, messages: Messages, warn: Callable[[str], None] | None = None) -> Any:
    """An `ILogger` that keeps errors in `messages` and gives warnings to `warn`."""
    base = toolkit.module.ILogger
    errors = (base.Severity.INTERNAL_ERROR, base.Severity.ERROR)

    class Logger(base):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                messages.add(msg)
            elif warn is not None and severity == base.Severity.WARNING:
                warn(msg)

    return Logger()

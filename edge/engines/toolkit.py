"""The `tensorrt` Python package: whether it is there, which version it is, and what it has to say.

Owns its import, the differences between versions, and its messages. Knows no bundle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

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
    """What TensorRT complained about, kept for the error that will follow.

    Attributes:
      ask: what gives sentences that did not come through the log, the oldest first.
    """

    def __init__(self) -> None:
        self._errors: list[str] = []
        self.ask: Callable[[], Sequence[str]] = tuple

    def add(self, text: str) -> None:
        """Take note of an error."""
        kept = [*self._errors, " ".join(text.split())]
        self._errors = (
            kept if len(kept) <= MOST_MESSAGES else [*kept[: MOST_MESSAGES // 2], *kept[-MOST_MESSAGES // 2 :]]
        )

    def told(self, otherwise: str = "TensorRT gave no reason") -> str:
        """All of them in one line, the oldest first, and forget them."""
        logged, self._errors = self._errors, []
        others = [line for line in self.ask() if not any(line in text for text in logged)]
        return "; ".join([*others, *logged]) or otherwise


def logger_of(toolkit: TensorRT) -> tuple[Any, Messages]:
    """The process's one `ILogger`, and the errors that it keeps.

    There is one because TensorRT goes on with the first that it was given for all that belongs to no builder and no
    runtime.
    """
    found = _loggers.get(toolkit.module)
    if found is None:
        messages = Messages()
        found = _loggers[toolkit.module] = _make_logger(toolkit, messages), messages
    return found


_loggers: WeakKeyDictionary[Any, tuple[Any, Messages]] = WeakKeyDictionary()
"""By module: never freed, as TensorRT keeps the address."""


def _make_logger(toolkit: TensorRT, messages: Messages) -> Any:
    base = toolkit.module.ILogger
    errors = (base.Severity.INTERNAL_ERROR, base.Severity.ERROR)

    class Logger(base):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                messages.add(msg)

    return Logger()


def start(toolkit: TensorRT, kind: str) -> Any:
    """A `Builder` or a `Runtime`.

    Raises:
      EngineError: TensorRT cannot make one, as where CUDA does not start.
    """
    logger, messages = logger_of(toolkit)
    messages.told()  # what was said before has nothing to do with it
    try:
        return getattr(toolkit.module, kind)(logger)
    except (TypeError, RuntimeError) as error:  # the package's way to say that it got a null pointer
        raise EngineError(
            f"TensorRT {toolkit.text} does not start: {messages.told(str(error))}",
            hint="Run `streamo-edge doctor`",
        ) from None

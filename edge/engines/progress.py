"""How far TensorRT is with an engine, told as it goes.

Owns the translation of TensorRT's nested phases into one line. Ctrl-C ends a build between two steps.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from edge.engines.toolkit import TensorRT

Report = Callable[[str, int, int], None]
"""Called as (what, done, total)."""


def make_monitor(toolkit: TensorRT, report: Report) -> Any:
    """An `IProgressMonitor` that reports outermost phases; `interrupted` says that the user ended the build."""
    base = toolkit.module.IProgressMonitor

    class Monitor(base):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.interrupted = False
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._totals[phase_name] = max(1, num_steps)
                self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._totals:
                self._tell(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._totals:
                self._tell(phase_name, self._totals.pop(phase_name))

        def _tell(self, phase_name: str, done: int) -> None:
            try:
                total = self._totals.get(phase_name, done)
                report(phase_name, min(done, total), max(1, total))
            except KeyboardInterrupt:  # TensorRT's C++ in between would lose it
                self.interrupted = True

    return Monitor()


@contextmanager
def interrupting(monitor: Any) -> Iterator[None]:
    """Have Ctrl-C end the build between two of its steps.

    The exception that Python makes of it by default would fly into TensorRT's C++ from wherever the monitor is just
    then, and be lost there. Signals are the main thread's: in another one nothing is changed.
    """

    def interrupt(number: int, frame: Any) -> None:
        monitor.interrupted = True

    before = None
    with suppress(ValueError):
        before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)

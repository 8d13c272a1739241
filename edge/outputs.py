"""All sinks of a run as one. Owns what happens when one of them fails; knows no kind of sink and no thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from edge.errors import EdgeError, OutputError
from edge.events import ERROR, Event, EventFactory
from edge.masking import mask_secrets
from edge.sinks.base import Sink


def error_fields(error: EdgeError) -> dict[str, Any]:
    """What an `error` event says about `error`."""
    hint = {"hint": mask_secrets(error.hint)} if error.hint else {}
    return {"code": type(error).__name__, "message": mask_secrets(error.message), **hint}


class Outputs:
    """Sends events to every sink; one that fails is closed and left out, and the others hear of it.

    Until `forgiving` is set, at the first turn, a failing sink is an error: nothing is lost by stopping then. When no
    sink is left that is an error again, since nobody would ever see the rest.
    """

    def __init__(self, sinks: Sequence[Sink], factory: EventFactory, on_warning: Callable[[str], None]) -> None:
        self._active = list(sinks)
        self._factory = factory
        self._on_warning = on_warning
        self.forgiving = False

    def open(self) -> None:
        """Open every sink.

        Raises:
          OutputError: one cannot be written.
        """
        for sink in self._active:
            sink.open()

    def emit(self, event_type: str, /, **fields: Any) -> Event:
        """Make the next event and hand it to every sink.

        Raises:
          OutputError: no sink is left, or one failed before the first turn.
        """
        event = self._factory.make(event_type, **fields)
        failed: list[tuple[Sink, OutputError]] = []
        for sink in self._active:
            try:
                sink.handle(event)
            except OutputError as problem:
                failed.append((sink, problem))
        for sink, _ in failed:
            self._active.remove(sink)
            self._close_one(sink)
        for _, error in failed:
            if not self.forgiving or not self._active:
                raise error
            self._on_warning(error.message)
            self.emit(ERROR, **error_fields(error))
        return event

    def close(self) -> None:
        """Finish every sink; those that cannot be finished are warned of."""
        with ExitStack() as stack:  # each is closed, even when closing another one fails
            for sink in reversed(self._active):
                stack.callback(self._close_one, sink)
            self._active = []

    def _close_one(self, sink: Sink) -> None:
        try:
            sink.close()
        except OutputError as error:
            self._on_warning(error.message)

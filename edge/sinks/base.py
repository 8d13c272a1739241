"""What every sink offers: a place where events go. Knows no kind of sink."""

from __future__ import annotations

from typing import Protocol

from edge.events import Event


class Sink(Protocol):
    """One output of a stream.

    A sink may also have `handle_frame(frame)`, which gets up to ten pictures a second, the turns' own among them.
    Pictures are work, so the runtime calls such a sink from a thread of its own.
    """

    name: str

    def open(self) -> None:
        """Make sure that the output can be written, without replacing anything; a second call does nothing.

        Raises:
          OutputError: it cannot.
        """
        ...

    def handle(self, event: Event) -> None:
        """Write what this sink makes of `event`.

        Raises:
          OutputError: it could not be written; what was written before stays readable.
        """
        ...

    def close(self) -> None:
        """Finish the output; may be called twice."""
        ...

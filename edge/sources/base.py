"""What every video source offers. Owns the interface; knows no kind of source.

A source only opens, reads and closes. It never retries, never sleeps to pace itself and never chooses frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edge.frames import Frame


@dataclass(frozen=True)
class SourceInfo:
    """What is known about a stream once its first picture is there; None where the source does not say."""

    width: int
    height: int
    fps: float | None = None
    duration_s: float | None = None


class Source(Protocol):
    """One stream of pictures.

    A source may also have `dropped_frames: int` (arrived and never read), `ending: Ending | None` (how the stream
    ended, known once `read` has returned None) and, where it is recorded, `skip_to(media_time_s) -> int`: go on with
    the newest picture that is not after that time, as far as that is cheaper than reading the ones before; returns how
    many it left out.
    """

    name: str
    live: bool

    def open(self) -> SourceInfo:
        """Open the stream; its first picture has media time 0.

        Raises:
          SourceError: it does not open, or holds no picture.
        """
        ...

    def read(self) -> Frame | None:
        """The next picture, media times never going back; None once the stream has ended.

        Raises:
          SourceError: the stream broke off.
        """
        ...

    def close(self) -> None:
        """Let go of everything; may be called twice, and from another thread while a live `read` waits."""
        ...


@dataclass(frozen=True)
class Ending:
    """How a recorded stream ended: frames read, and frames that it had announced (None: it announced none)."""

    frames_read: int
    frames_announced: int | None = None

    @property
    def early(self) -> bool:
        """Clearly fewer frames came than announced. Some containers only estimate, so a few are forgiven."""
        if self.frames_announced is None:
            return False
        return self.frames_announced - self.frames_read > max(2, self.frames_announced // 100)

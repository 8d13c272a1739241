"""The only place where the runtime reads time.

Logic takes a `Clock` and never imports `time`, so that tests and simulations own the hours that pass.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time in nanoseconds, and a way to wait for it."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since an arbitrary start; never goes back."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since 1970, a label for people; may jump."""
        ...

    def sleep_until_ns(self, deadline_ns: int) -> None:
        """Return once `monotonic_ns()` has reached `deadline_ns`."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()

    def sleep_until_ns(self, deadline_ns: int) -> None:
        remaining_ns = deadline_ns - time.monotonic_ns()
        if remaining_ns > 0:
            time.sleep(remaining_ns / 1e9)


class FakeClock:
    """A clock that moves only when told to; sleeping moves it to the deadline at once."""

    def __init__(self, start_ns: int = 0, wall_start_ns: int = 0) -> None:
        self._now_ns = start_ns
        self._wall_offset_ns = wall_start_ns - start_ns

    def monotonic_ns(self) -> int:
        return self._now_ns

    def wall_ns(self) -> int:
        return self._now_ns + self._wall_offset_ns

    def sleep_until_ns(self, deadline_ns: int) -> None:
        self._now_ns = max(self._now_ns, deadline_ns)

    def advance_ns(self, delta_ns: int) -> None:
        """Let `delta_ns` pass."""
        self._now_ns += delta_ns

    def jump_wall_ns(self, delta_ns: int) -> None:
        """Step the wall clock, as a time server would; monotonic time is untouched."""
        self._wall_offset_ns += delta_ns


class Stopwatch:
    """Measures the stages of one turn."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_ns = self._last_ns = clock.monotonic_ns()
        self._laps_ms: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Give the time since the last lap to `name`."""
        now_ns = self._clock.monotonic_ns()
        self._laps_ms[name] = (now_ns - self._last_ns) / 1e6
        self._last_ns = now_ns

    def laps_ms(self, total_name: str) -> dict[str, float]:
        """Milliseconds of each stage, and of all together as `total_name`."""
        return {**self._laps_ms, total_name: (self._last_ns - self._start_ns) / 1e6}

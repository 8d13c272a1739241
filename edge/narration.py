"""The events of turns: what the session gives back, told in the schema's words.

Owns their fields and their order. Does not know which turns are served, nor where the events go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge.clock import Clock
from edge.events import (
    QUESTION_ASKED,
    QUESTION_CLOSED,
    RESPONSE_COMPLETED,
    RESPONSE_CREATED,
    RESPONSE_DELTA,
    TURN_STATE,
    media_time,
)
from edge.pacing import DueTurn
from edge.turn import Turn, TurnState

Emit = Callable[..., Any]


class Narrator:
    """Tells one stream's turns, in order. One turn at a time: `begin`, any number of `text`, `finish`."""

    def __init__(self, emit: Emit, clock: Clock, *, late_after_s: float, every_turn: bool) -> None:
        """`late_after_s`: an event about a frame older than this says so. `every_turn`: tell unchanged states too."""
        self._emit = emit
        self._clock = clock
        self._late_after_s = late_after_s
        self._every_turn = every_turn
        self._told_state: TurnState | None = None
        self._number = 0

    def question(self, t: int, text: str, at_s: float) -> None:
        """A question joins the turn of second `t`."""
        self._emit(QUESTION_ASKED, turn=self._number + 1, media_time=media_time(t, t + 1), at_s=float(at_s), text=text)

    def closed(self, t: int, text: str, at_s: float) -> None:
        """A question needs no more answers from the turn of second `t` on."""
        self._emit(QUESTION_CLOSED, turn=self._number + 1, media_time=media_time(t, t + 1), at_s=float(at_s), text=text)

    def begin(self, due: DueTurn, frame_at_ns: int | None) -> None:
        """A turn starts; `frame_at_ns` is when its picture was there, None where that means nothing."""
        self._number += 1
        self._frame_at_ns = frame_at_ns
        self._start_ns = self._clock.monotonic_ns()
        self._first_text_ms: float | None = None
        self._where = {"turn": self._number, "media_time": media_time(due.t, due.t + 1)}

    def text(self, piece: str) -> None:
        """The model said `piece` of its reply."""
        if self._first_text_ms is None:
            self._first_text_ms = (self._clock.monotonic_ns() - self._start_ns) / 1e6
            self._emit(RESPONSE_CREATED, **self._where)
        if piece:
            self._emit(RESPONSE_DELTA, **self._where, text=piece)

    def finish(self, turn: Turn) -> dict[str, float]:
        """The turn is over: tell it, and return its times in milliseconds, ours added to the session's."""
        spoke = turn.state is TurnState.RESPONSE or bool(turn.text) or self._first_text_ms is not None
        if spoke and self._first_text_ms is None:  # a session that does not stream, or an empty reply
            self.text(turn.text)
        times_ms, late = self._times(turn, spoke)
        common = {
            "late": late,
            "timing_ms": {stage: round(time_ms, 1) for stage, time_ms in times_ms.items()},
            "tokens": {"visual": turn.visual_tokens, "generated": turn.reply_tokens},
            "kv": {"used": turn.kv_tokens, "evicted_turns": turn.evicted_turns},
        }
        state = turn.state.value
        if spoke:
            notes = {name: True for name in ("truncated", "off_protocol") if getattr(turn, name)}
            answers = {"question": turn.question} if turn.question else {}
            said = {"state": state, "text": turn.text.strip(), "final": True}
            self._emit(RESPONSE_COMPLETED, **self._where, **said, **answers, **notes, **common)
        if self._every_turn or turn.state is not self._told_state:
            self._told_state = turn.state
            self._emit(TURN_STATE, **self._where, state=state, **common)
        return times_ms

    def _times(self, turn: Turn, spoke: bool) -> tuple[dict[str, float], bool]:
        times_ms = dict(turn.timing_ms)
        if spoke and self._first_text_ms is not None:
            times_ms["first_text"] = self._first_text_ms
        if self._frame_at_ns is None:
            return times_ms, False
        times_ms["frame_age"] = (self._start_ns - self._frame_at_ns) / 1e6
        age_ms = (self._clock.monotonic_ns() - self._frame_at_ns) / 1e6
        if spoke:
            times_ms["frame_to_event"] = age_ms
        return times_ms, age_ms > self._late_after_s * 1e3

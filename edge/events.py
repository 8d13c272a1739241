"""What happens in a stream, as one flat JSON object an event (schema `streamo.event/1`).

Owns the schema and the sequence numbers. Does not know where events go (see `sinks`) nor what causes them.
Within `/1` fields are only ever added; a reader ignores those that it does not know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from edge.clock import Clock

SCHEMA = "streamo.event/1"

SESSION_CREATED = "session.created"
SESSION_ENDED = "session.ended"
SOURCE_STATE = "source.state"
QUESTION_ASKED = "question.asked"
QUESTION_CLOSED = "question.closed"
TURN_STATE = "turn.state"
RESPONSE_CREATED = "response.created"
RESPONSE_DELTA = "response.delta"
RESPONSE_COMPLETED = "response.completed"
FRAMES_DROPPED = "frames.dropped"
ERROR = "error"


@dataclass(frozen=True)
class Event:
    """One event; `fields` holds what its type adds to the envelope."""

    type: str
    seq: int
    session: str
    stream: str
    wall_ns: int
    fields: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The event as plain JSON values, envelope first."""
        return {
            "schema": SCHEMA,
            "type": self.type,
            "seq": self.seq,
            "session": self.session,
            "stream": self.stream,
            "time": datetime.fromtimestamp(self.wall_ns / 1e9, timezone.utc).isoformat(timespec="milliseconds"),
            **self.fields,
        }

    def to_line(self) -> str:
        """The event as one JSON line, without the newline."""
        return json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":"))


class EventFactory:
    """Makes the events of one session and numbers them from 1."""

    def __init__(self, session: str, stream: str, clock: Clock) -> None:
        self._session = session
        self._stream = stream
        self._clock = clock
        self._seq = 0

    def make(self, event_type: str, **fields: Any) -> Event:
        """The next event; `fields` must be JSON values."""
        self._seq += 1
        return Event(event_type, self._seq, self._session, self._stream, self._clock.wall_ns(), fields)


def media_time(start_s: float, end_s: float) -> dict[str, float]:
    """The interval of the stream that an event speaks of, in stream seconds."""
    return {"start_s": float(start_s), "end_s": float(end_s)}

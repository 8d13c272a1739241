"""Real turns as data: a user's clips, and the conversations that the unquantised model has about them.

Owns what a conversation consists of, part by part as a runtime appends it, which parts decide a state, and which turns
are calibrated on and which are held out. Where clips come from is the caller's business, how a conversation comes about
`converse`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.probe import Probe

HELD_OUT = 0.25
"""The last part of each clip, of whose turns nothing is calibrated on."""
UNASKED, TURN, PIECE, WORD = "unasked", "turn", "piece", "word"
OWN, FILLED, SILENT = "own", "filled", "silent"

Patches = tuple[np.ndarray, int, int]
"""A frame as the vision tower takes it: patches, rows, columns."""


@dataclass(frozen=True)
class Clip:
    """A video as one frame a turn.

    Args:
      name: for notes and reports.
      frames: (H, W, 3) uint8 RGB each; frame t is the one of turn t.
      questions: by turn. Before the first the model is not asked, as in the official loop.
      held_out: None: the last quarter of its turns; else whether all of its turns are.
    """

    name: str
    frames: Sequence[np.ndarray]
    questions: dict[int, str]
    held_out: bool | None = None

    @property
    def calibration_turns(self) -> int:
        """How many of its first turns are not held out."""
        count = len(self.frames)
        return count - max(1, round(HELD_OUT * count)) if self.held_out is None else (0 if self.held_out else count)


@dataclass(frozen=True)
class Conversation(Probe):
    """One clip's conversation, teacher-forced: `parts` are token ids as the runtime appends them.

    Beside `Probe`'s, one entry a part:

    Attributes:
      name: the clip's.
      roles: what the logits after a part are for. `turn`: they decide the state; `piece`: a state's next piece, where
        states are spelt; `word`: a reply's next token or its end; `unasked`: nothing was asked yet, nobody reads them.
      turns: which turn a part belongs to.
      decided: the token that the unquantised model chose after a part, in `silent` ones silence; -1 after `unasked`.
      states: of each turn: `silence`, `standby`, `response`, or `other` where the model broke the protocol.
      first_held_out: the first turn that is held out.
      visual: (N, W) float32 of each frame, what the unquantised vision tower makes of it.
      replies: `own`: states and words are the unquantised model's, decided turn by turn; `filled`: each turn's state
        is what it chooses after a conversation of silence, and responses have no words; `silent`: each turn's state is
        silence, for turns that are only compared. Both for models too large to be asked turn by turn.
    """

    name: str = ""
    roles: list[str] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    decided: list[int] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    first_held_out: int = 0
    visual: list[np.ndarray] = field(default_factory=list)
    replies: str = OWN

    @property
    def calibration_tokens(self) -> int:
        """How many of the first `ids` are in front of the first held-out turn."""
        return sum(len(part) for part, turn in zip(self.parts, self.turns, strict=True) if turn < self.first_held_out)

    @property
    def held_out_parts(self) -> list[int]:
        """Parts of held-out turns whose logits are read."""
        pairs = enumerate(zip(self.roles, self.turns, strict=True))
        return [i for i, (role, turn) in pairs if role != UNASKED and turn >= self.first_held_out]


def describe_turns(talks: Sequence[Conversation]) -> dict[str, Any]:
    """What a manifest says about the turns that an export was calibrated on."""
    digest = hashlib.sha256()
    for talk in talks:
        digest.update(talk.ids.astype("<i8").tobytes())
        for patches, _, _ in talk.frames:
            digest.update(patches.astype("<f4").tobytes())
    return {
        "clips": [talk.name for talk in talks],
        "turns": sum(min(talk.first_held_out, len(talk.frames)) for talk in talks),
        "held_out_turns": sum(len(talk.frames) - talk.first_held_out for talk in talks),
        "tokens": sum(talk.calibration_tokens for talk in talks),
        "replies": sorted({talk.replies for talk in talks}),
        "sha256": digest.hexdigest(),
    }

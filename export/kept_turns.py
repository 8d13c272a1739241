"""Conversations of the unquantised model that an interrupted export has had already.

Owns what of a conversation is kept: its tokens, what was decided, and what the vision tower made of the frames. The
frames themselves are made from the clip again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export.kept import Kept, Record
from export.turns import Conversation, Patches

FACTS = ("name", "roles", "turns", "decided", "states", "first_held_out", "replies", "image_pad", "merge_size")


@dataclass(frozen=True)
class KeptTurns:
    """The conversations of one export, by the number of their clip."""

    kept: Kept

    def save(self, clip: int, talk: Conversation) -> None:
        facts = {name: getattr(talk, name) for name in FACTS}
        facts |= {"parts": [part.tolist() for part in talk.parts]}
        self.kept.save(_name(clip), Record(facts, {str(i): visual for i, visual in enumerate(talk.visual)}))

    def load(self, clip: int, frames: list[Patches]) -> Conversation | None:
        """The conversation about these frames, or None."""
        record = self.kept.load(_name(clip))
        if record is None:
            return None
        facts = dict(record.facts)
        parts = [np.array(part, np.int64) for part in facts.pop("parts")]
        return Conversation(frames, parts, visual=list(record.arrays.values()), **facts)


def _name(clip: int) -> str:
    return f"turns-{clip}"

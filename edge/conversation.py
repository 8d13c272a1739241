"""Token ids of the conversation's parts.

Owns the cuts through a turn's text that fall between two tokens. Does not know which turns are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from edge.decoder import FrameTokens, Segment
from edge.prompt import IM_END, Protocol
from edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class TurnIds:
    """The text of a turn's user side, tokenised as a whole and cut into the parts that leave the window separately.

    Attributes:
      header: what opens the turn.
      questions: by question, with the line's end.
      before_frame, after_frame: the rest.
    """

    header: list[int]
    questions: list[list[int]]
    before_frame: list[int]
    after_frame: list[int]


class Conversation:
    """Token ids of one protocol's conversation, as one tokenizer spells it."""

    def __init__(self, tokenizer: Tokenizer, protocol: Protocol) -> None:
        self._tokenizer = tokenizer
        self._protocol = protocol
        self.system_ids = tokenizer.encode(protocol.system_text())
        self.closing_ids = tokenizer.encode(f"{IM_END}\n")

    def turn_segments(self, t: int, questions: Sequence[str], frame: FrameTokens) -> list[Segment]:
        """The user's side of a turn, up to where the assistant's first token follows."""
        before, after = self._protocol.turn_text(t, "\n".join(questions))
        return [self._tokenizer.encode(before), frame, self._tokenizer.encode(after)]

    def turn_ids(self, t: int, questions: Sequence[str]) -> TurnIds:
        """The same text, in parts that join to the same tokens.

        A cut is made where tokenising the text up to there gives a beginning of the whole turn's tokens. With Qwen's
        tokenizer that is exact, since a line's end never merges with what follows it; where another one merges across
        a cut, the merged token stays with the later part.
        """
        (front, behind), after = self._protocol.turn_pieces(t)
        lines = [f"{question}\n" for question in questions]
        ids = self._tokenizer.encode(front + "".join(lines) + behind)
        cuts = [0]
        text = ""
        for piece in (front, *lines):
            text += piece
            cuts.append(max(cuts[-1], _common_length(ids, self._tokenizer.encode(text))))
        parts = [ids[start:end] for start, end in pairwise(cuts)]
        return TurnIds(parts[0], parts[1:], ids[cuts[-1] :], self._tokenizer.encode(after))

    def turn_text_tokens(self, t: int) -> int:
        """Text tokens of the user's side of a turn without a question."""
        before, after = self._protocol.turn_text(t)
        return len(self._tokenizer.encode(before)) + len(self._tokenizer.encode(after))

    def question_tokens(self, questions: Sequence[str]) -> int:
        """Tokens that the questions take together."""
        return len(self._tokenizer.encode("\n".join(questions)))


def tokens_of(segments: Sequence[Segment]) -> int:
    """Cache rows that the segments take."""
    return sum(len(s.embeds) if isinstance(s, FrameTokens) else len(s) for s in segments)


def _common_length(left: list[int], right: list[int]) -> int:
    """How many tokens both begin with."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))

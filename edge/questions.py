"""The questions of a stream: asked, open, closed.

Owns which of them the model still has to mind. Does not know turns nor the cache (see `rebuild` and `slide`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.errors import QuestionError

MAX_QUESTION_TOKENS = 512
"""Open questions stay in the window for ever, so their tokens are bounded: beyond this the oldest is forgotten."""
MAX_OPEN_QUESTIONS = 30
"""And so is their number: attention turns the query anew for each, and what it needs for that is allocated once."""


@dataclass(eq=False)
class OpenQuestion:
    """A question that somebody asked.

    Attributes:
      number: counts the questions of a session, from 1.
      closed: nobody waits for an answer any more; it leaves the window with its turn, or at once if that has left.
    """

    number: int
    text: str
    closed: bool = False


class Questions:
    """All questions of one session that are waiting for a turn or open.

    Args:
      count_tokens: tokens that some texts, one a line, take together.
    """

    def __init__(self, count_tokens: Callable[[Sequence[str]], int]) -> None:
        self._count_tokens = count_tokens
        self._asked: list[OpenQuestion] = []  # wait for the next turn
        self._open: list[OpenQuestion] = []
        self._next_number = 1

    @property
    def open(self) -> list[OpenQuestion]:
        """The questions of the conversation that are not closed, oldest first."""
        return list(self._open)

    @property
    def open_or_asked(self) -> list[OpenQuestion]:
        """The open questions and those that wait for the next turn, oldest first."""
        return [*self._open, *self._asked]

    def ask(self, text: str) -> int:
        """Let a question join the next turn; return its number.

        Raises:
          QuestionError: as `check`.
        """
        self.check(text)
        question = OpenQuestion(self._next_number, text.strip())
        self._next_number += 1
        self._asked.append(question)
        return question.number

    def check(self, text: str) -> None:
        """Refuse a question that `ask` would refuse.

        Raises:
          QuestionError: empty, or too long, with those that wait for the next turn, to stay in the window.
        """
        question = text.strip()
        if not question:
            raise QuestionError("A question is empty", hint="Ask something, for example `Describe each event.`")
        tokens = self._count_tokens([*(asked.text for asked in self._asked), question])
        if tokens > MAX_QUESTION_TOKENS:
            raise QuestionError(
                f"The questions of one turn should have at most {MAX_QUESTION_TOKENS} tokens to stay in the window, "
                f"found {tokens}",
                hint="Ask something shorter",
            )

    def close(self, question: int | str) -> OpenQuestion:
        """Close a question by its number or its text; of several with the same text, the oldest.

        Raises:
          QuestionError: no such question is open.
        """
        wanted = question.strip() if isinstance(question, str) else question
        for group in (self._open, self._asked):
            for found in group:
                if wanted in (found.number, found.text):
                    group.remove(found)
                    found.closed = True
                    return found
        named = f"number {wanted}" if isinstance(wanted, int) else f"`{_shown(wanted)}`"
        still_open = "; ".join(f"{q.number}: {_shown(q.text)}" for q in self.open_or_asked[:5])
        raise QuestionError(
            f"No question {named} is open", hint=f"Open are {still_open}" if still_open else "No question is open"
        )

    def join_turn(self) -> list[OpenQuestion]:
        """What was asked since the turn before, open from now on; where that is too much, the oldest are closed."""
        joined, self._asked = self._asked, []
        self._open += joined
        while joined and self._too_many():
            self._open.pop(0).closed = True
        return joined

    def _too_many(self) -> bool:
        tokens = self._count_tokens([question.text for question in self._open])
        return tokens > MAX_QUESTION_TOKENS or len(self._open) > MAX_OPEN_QUESTIONS

    def clear(self) -> None:
        """Forget them all; numbers go on."""
        self._asked, self._open = [], []


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."

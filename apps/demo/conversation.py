"""One labelled stream as token ids, m-RoPE positions and training targets.

Owns where in the token sequence each turn's state and reply are predicted, and how a history is spoilt on purpose.
Needs numpy and tokenizers; knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from apps.demo import phrases
from apps.demo.labels import RESPONSE, SILENCE, STANDBY, Turn
from apps.demo.vocabulary import build_tokenizer
from edge.prompt import IM_END, IMAGE_PAD, STREAMO

STATES = (SILENCE, STANDBY, RESPONSE)
IGNORED = -100
MERGED_ROWS, MERGED_COLUMNS = 3, 5


@lru_cache(maxsize=1)
def tokenizer():
    """The demonstration's tokenizer, built once per process."""
    return build_tokenizer()


@lru_cache(maxsize=20000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text that contains no visual tokens."""
    return tuple(tokenizer().encode(text).ids)


@lru_cache(maxsize=1)
def state_ids() -> tuple[int, int, int]:
    """Ids of silence, standby and response."""
    silence, standby, response = (tokenizer().token_to_id(text) for text in STREAMO.state_texts())
    return silence, standby, response


def reply_text(turn: Turn) -> str:
    """The assistant's message of a turn, without its closing tokens."""
    state = STREAMO.state_texts()[STATES.index(turn.state)]
    return f"{state} {turn.text}" if turn.state == RESPONSE else state


@dataclass
class Conversation:
    """Token arrays of one stream. `decide[i]` is the index of the token whose output gives turn i's state."""

    ids: np.ndarray  # (S,) int32
    positions: np.ndarray  # (3, S) int32
    target: np.ndarray  # (S,) int32: the token to predict after each token, or IGNORED
    decide: np.ndarray  # (turns,) int32
    tags: np.ndarray  # (S,) int32: the next token where that belongs to a time tag that follows from the one before


class _Writer:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.target: list[int] = []
        self.tags: dict[int, int] = {}
        self.columns: list[np.ndarray] = []
        self.next_position = 0

    def text(self, ids: tuple[int, ...]) -> None:
        self.ids += ids
        self.target += [IGNORED] * len(ids)
        run = np.arange(self.next_position, self.next_position + len(ids))
        self.columns.append(np.broadcast_to(run, (3, len(ids))))
        self.next_position += len(ids)

    def image(self, pad: int) -> None:
        count = MERGED_ROWS * MERGED_COLUMNS
        self.ids += [pad] * count
        self.target += [IGNORED] * count
        row, column = np.divmod(np.arange(count), MERGED_COLUMNS)
        self.columns.append(self.next_position + np.stack([np.zeros(count, int), row, column]))
        self.next_position += max(MERGED_ROWS, MERGED_COLUMNS)

    def tag(self, start: int, ids: tuple[int, ...]) -> None:
        """Mark the time tag in a turn's opening `ids`, which begin at index `start`, as to be predicted."""
        for offset in range(ids.index(encode("<")[0]) + 1, len(ids)):
            self.tags[start + offset - 1] = ids[offset]

    def learn(self, start: int, ids: tuple[int, ...]) -> None:
        """Mark the tokens `ids`, which begin at index `start`, as to be predicted."""
        for offset, token in enumerate(ids):
            self.target[start + offset - 1] = token


def write_conversation(
    truth: list[Turn],
    questions: dict[int, str],
    first_time_s: int = 0,
    said: dict[int, Turn] | None = None,
    unlearned: frozenset[int] = frozenset(),
) -> Conversation:
    """Tokens of a stream's conversation.

    Args:
      truth: what each turn should answer.
      questions: by turn.
      first_time_s: the time tag of turn 0.
      said: turns whose reply in the history differs from the truth; their state is still to be learned.
      unlearned: turns that carry no loss, besides those before the first question.
    """
    said = said or {}
    pad = tokenizer().token_to_id(IMAGE_PAD)
    close = encode(IM_END + "\n")
    writer = _Writer()
    writer.text(encode(STREAMO.system_text()))
    decide = []
    first_question = min(questions, default=len(truth))
    for turn, label in enumerate(truth):
        before, after = STREAMO.turn_text(first_time_s + turn, questions.get(turn, ""))
        if turn and turn not in questions:
            writer.tag(len(writer.ids), encode(before))
        writer.text(encode(before))
        writer.image(pad)
        writer.text(encode(after))
        decide.append(len(writer.ids) - 1)
        reply = encode(reply_text(said.get(turn, label)) + IM_END + "\n")
        start = len(writer.ids)
        writer.text(reply)
        if turn < first_question or turn in unlearned:
            continue
        if turn in said and said[turn] != label:
            writer.learn(start, (state_ids()[STATES.index(label.state)],))
        else:
            writer.learn(start, reply[: len(reply) - len(close) + 1])
    positions = np.concatenate(writer.columns, axis=1).astype(np.int32)
    tags = np.full(len(writer.ids), IGNORED, np.int32)
    tags[list(writer.tags)] = list(writer.tags.values())
    ids, target = np.array(writer.ids, np.int32), np.array(writer.target, np.int32)
    return Conversation(ids, positions, target, np.array(decide, np.int32), tags)


def spoil(rng: np.random.Generator, truth: list[Turn], first: int, rate: float) -> dict[int, Turn]:
    """Wrong replies for some turns from `first` on, as a model that errs would leave them in its history."""
    wrong: dict[int, Turn] = {}
    texts = [turn.text for turn in truth if turn.text] or ["The light goes on."]
    for turn in range(first, len(truth)):
        if rng.random() >= rate:
            continue
        label = truth[turn]
        kind = STATES[int(rng.integers(3))]
        if kind != RESPONSE:
            wrong[turn] = Turn(kind)
            continue
        text = label.text or texts[int(rng.integers(len(texts)))]
        if text.startswith("Given event"):
            low = max(turn - int(rng.integers(8)), 0)
            text = phrases.GROUNDING_REPLY.format(start_s=low, end_s=turn)
        else:
            for words in (phrases.COLOURS, phrases.SHAPES):
                for word in words:
                    if word in text and rng.random() < 0.5:
                        text = text.replace(word, words[int(rng.integers(len(words)))])
                        break
        wrong[turn] = Turn(RESPONSE, text)
    return wrong


def garble(rng: np.random.Generator, truth: list[Turn]) -> str:
    """A reply that begins well, or not, and loses itself in digits or repetition."""
    texts = [turn.text for turn in truth if turn.text] or ["The light goes on."]
    words = texts[int(rng.integers(len(texts)))].split()
    start = words[: int(rng.integers(len(words)))]
    length = int(rng.integers(4, 100))
    if rng.random() < 0.5:
        digits = "".join(str(digit) for digit in rng.integers(0, 10, length))
        return " ".join([*start, digits])
    loop = words[: int(rng.integers(1, 4))]
    return " ".join([*start, *(loop * length)[: max(length // 2, 3)]])

"""Lets the unquantised model talk about clips, turn by turn where it fits in memory, else in as few passes as will do.

Owns the protocol's parts as they are appended, and how much is asked of a model that does not fit. What a conversation
is, is `turns`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from edge.contract import TokenIds
from edge.preprocess import PreprocessConfig, grid_of, patchify, resize_frame
from edge.prompt import STREAMO, Protocol
from export.checkpoint import Checkpoint
from export.float_model import FloatModel
from export.probe import Probe
from export.tokens import encoder
from export.turns import FILLED, OWN, PIECE, SILENT, TURN, UNASKED, WORD, Clip, Conversation, Patches

if TYPE_CHECKING:
    from export.kept_turns import KeptTurns

MAX_REPLY_TOKENS = 64
LARGE_CLIPS, LARGE_TURNS = 6, 12
"""What is looked at of a model that does not fit in memory: encoding a frame takes it seconds."""
LARGE_HELD_OUT_CLIPS, LARGE_HELD_OUT_TURNS = 1, 6
"""Of clips that are held out as a whole: a pass over one takes such a model half a minute and more."""

Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Spelling:
    """How one model's conversation is spelt."""

    tokens: TokenIds
    tokenizer_json: bytes
    preprocess: PreprocessConfig
    protocol: Protocol = STREAMO


def converse(
    checkpoint: Checkpoint,
    spelling: Spelling,
    clips: Sequence[Clip],
    step: Step | None = None,
    kept: KeptTurns | None = None,
) -> list[Conversation]:
    """Let the unquantised model answer each clip: turn by turn where it fits in memory, else in two passes over the
    first turns of a few clips, and in none where all of a clip is held out.

    Args:
      kept: has the conversations that need not be had again, and gets the others.
    """
    model = FloatModel(checkpoint)
    clips, found = clips_used(clips, model.fits), []
    total = sum(len(clip.frames) for clip in clips)
    for index, clip in enumerate(clips):
        writer = _Writer(model, spelling, clip)
        talk = kept.load(index, writer.frames) if kept else None
        if talk is None:
            talk = writer.own() if model.fits else writer.silent() if clip.held_out else writer.filled()
            if kept and talk.visual:  # without, nothing was computed
                kept.save(index, talk)
        found.append(talk)
        if step is not None:
            step(sum(len(c.frames) for c in found), total)
    return found


def clips_used(clips: Sequence[Clip], fits: bool) -> Sequence[Clip]:
    """What is looked at of the clips, by a model that fits in memory or does not."""
    if fits:
        return clips
    calibrated, whole = ([clip for clip in clips if bool(clip.held_out) == held_out] for held_out in (False, True))
    return [_shortened(clip) for clip in (*calibrated[:LARGE_CLIPS], *whole[:LARGE_HELD_OUT_CLIPS])]


def _shortened(clip: Clip) -> Clip:
    """The first turns from its first question on."""
    first = min(clip.questions, default=0)
    most = LARGE_HELD_OUT_TURNS if clip.held_out else LARGE_TURNS
    turns = range(first, min(first + most, len(clip.frames)))
    questions = {turn - first: text for turn, text in clip.questions.items() if turn in turns}
    return replace(clip, frames=[clip.frames[turn] for turn in turns], questions=questions)


class _Writer:
    """Writes one clip's conversation."""

    def __init__(self, model: FloatModel, spelling: Spelling, clip: Clip) -> None:
        self._model, self._clip, self._spelling = model, clip, spelling
        self._tokens = tokens = spelling.tokens
        self._encode = encoder(spelling.tokenizer_json)
        self._closing = [tokens.im_end, *self._encode("\n")]
        self._states = {tokens.silence: "silence", tokens.standby: "standby", tokens.response: "response"}
        self._stops = (tokens.im_end, tokens.end_of_text)
        self.frames = [_patches(frame, spelling.preprocess) for frame in clip.frames]
        self._first_question = min(clip.questions, default=len(clip.frames))

    @cached_property
    def _visual(self) -> list[np.ndarray]:
        return self._model.vision(self.frames)

    def own(self) -> Conversation:
        """Turn by turn, with a cache."""
        talk = self._empty(OWN, self._visual)
        self._caches, self._start = self._model.caches(), 0
        front = self._encode(self._spelling.protocol.system_text())
        for turn in range(len(self.frames)):
            asked = turn >= self._first_question
            ids, role = [*front, *self._prompt(turn)], TURN if asked else UNASKED
            logits = self._append(talk, ids, role, turn, self._visual[turn])
            reply = self._reply(talk, turn, logits) if asked else self._silent(talk)
            front = [*reply, *self._closing]
        return talk

    def _silent(self, talk: Conversation) -> list[int]:
        talk.states.append("silence")
        return list(self._tokens.silence)

    def _reply(self, talk: Conversation, turn: int, logits: np.ndarray) -> list[int]:
        """Decide and speak; returns the tokens that the cache does not hold yet."""
        ids = [self._choose(talk, logits)]
        while tuple(ids) not in self._states and any(state[: len(ids)] == tuple(ids) for state in self._states):
            ids.append(self._choose(talk, self._append(talk, ids[-1:], PIECE, turn)))
        state = self._states.get(tuple(ids), "other")
        talk.states.append(state)
        if state in ("silence", "standby"):
            return ids[-1:]
        if ids[-1] in self._stops:
            return []
        for _ in range(MAX_REPLY_TOKENS):
            token = self._choose(talk, self._append(talk, ids[-1:], WORD, turn))
            if token in self._stops:
                return []
            ids.append(token)
        return ids[-1:]

    def filled(self) -> Conversation:
        """Two passes over the whole conversation: silence everywhere, then the states chosen after that."""
        asked = range(self._first_question, len(self.frames))
        first = self.silent()
        embeds = first.embeds(self._model.embeddings(first.ids), self._visual)
        hidden = self._model.hidden(embeds, first.positions, self._model.caches())
        ends = [end for end, role in zip(first.ends, first.roles, strict=True) if role == TURN]
        chosen = {}
        if ends:
            logits = self._model.logits(hidden[np.array(ends) - 1])
            states = list(self._states)
            best = logits[:, [state[0] for state in states]].argmax(axis=1)
            chosen = {turn: states[i] for turn, i in zip(asked, best.tolist(), strict=True)}
        return self._written(chosen, self._empty(FILLED, self._visual))

    def silent(self) -> Conversation:
        """Silence everywhere. The model is not run, so that `visual` is empty."""
        asked = range(self._first_question, len(self.frames))
        return self._written(dict.fromkeys(asked, self._tokens.silence), self._empty(SILENT, []))

    def _written(self, chosen: dict[int, tuple[int, ...]], talk: Conversation) -> Conversation:
        """The conversation with these states and no words."""
        front = self._encode(self._spelling.protocol.system_text())
        for turn in range(len(self.frames)):
            role = TURN if turn in chosen else UNASKED
            state = chosen.get(turn, self._tokens.silence)
            self._note(talk, [*front, *self._prompt(turn)], role, turn, state[0] if role == TURN else -1)
            talk.states.append(self._states[state])
            front = [*state, *self._closing]
        return talk

    def _empty(self, replies: str, visual: list[np.ndarray]) -> Conversation:
        kept = self._clip.calibration_turns
        image_pad, merge = self._tokens.image_pad, self._spelling.preprocess.merge_size
        talk = Conversation(self.frames, [], image_pad, merge, name=self._clip.name, first_held_out=kept)
        return replace(talk, visual=visual, replies=replies)

    def _prompt(self, turn: int) -> list[int]:
        _, rows, columns = self.frames[turn]
        before, after = self._spelling.protocol.turn_text(turn, self._clip.questions.get(turn, ""))
        visual = rows * columns // self._spelling.preprocess.merge_size**2
        return [*self._encode(before), *[self._tokens.image_pad] * visual, *self._encode(after)]

    def _note(self, talk: Conversation, ids: list[int], role: str, turn: int, decided: int) -> None:
        talk.parts.append(np.array(ids, np.int64))
        talk.roles.append(role)
        talk.turns.append(turn)
        talk.decided.append(decided)

    def _append(
        self, talk: Conversation, ids: list[int], role: str, turn: int, visual: np.ndarray | None = None
    ) -> np.ndarray:
        """Run a part and return the logits (V,) behind it."""
        self._note(talk, ids, role, turn, -1)
        part = talk.parts[-1]
        embeds = self._model.embeddings(part)
        if visual is not None:
            embeds[part == talk.image_pad] = visual
        grids = [self.frames[turn]] if visual is not None else []
        positions = Probe(grids, [part], talk.image_pad, talk.merge_size).positions + self._start
        self._start = int(positions.max()) + 1
        hidden = self._model.hidden(embeds, positions, self._caches)
        return np.asarray(self._model.logits(hidden[-1:])[0])

    @staticmethod
    def _choose(talk: Conversation, logits: np.ndarray) -> int:
        talk.decided[-1] = token = int(np.argmax(logits))
        return token


def _patches(frame: np.ndarray, preprocess: PreprocessConfig) -> Patches:
    resized = resize_frame(frame, preprocess)
    return patchify(resized, preprocess), *grid_of(resized.shape[0], resized.shape[1], preprocess)

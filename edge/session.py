"""One stream's conversation: a frame goes in, the model's decision comes out.

Owns the order of a turn. Does not know where frames come from, nor threads, nor the wall clock; time is read from the
`Clock` that it is given, for measurement only.

Protocol: Streamo's `inference.py`. The state is read from the logits that prefilling the turn already gives; silence
and standby need no decode step, and the tokens that close a reply go in front of the next turn's prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from edge.backends import load_backend
from edge.backends.base import Backend
from edge.bundle import Bundle
from edge.capacity import MAX_QUESTION_TOKENS, plan_cache
from edge.clock import Clock, Stopwatch, SystemClock
from edge.contract import TOKENIZER_FILE
from edge.decoder import Decoder
from edge.errors import QuestionError, UsageError
from edge.history import History, KeptTurn
from edge.reply import Reply, StateReader
from edge.sampling import Sampler, Sampling
from edge.tokenizer import Tokenizer
from edge.turn import Turn
from edge.vision import VisionEncoder
from edge.window import Conversation, OpenQuestion, RebuildWindow

POLICIES = ("rebuild",)


class StreamSession:
    """A streaming model following one camera.

    Args:
      bundle: from `edge.open_bundle`.
      backend: `cpu`, or a loaded `Backend` of the caller's own.
      policy: what happens when the window is full. `rebuild` computes what the official loop computes: the oldest turn
        is dropped, its question is attached to the first kept turn, and the window is prefilled again from cached
        visual tokens with positions from 0.
      window_turns: turns kept, the present one included; None takes the bundle's default.
      max_reply_tokens: a longer reply is cut and closed, so that it never stalls the stream.
      sampling: how reply tokens are chosen; greedy by default. The decision to speak is always the most likely token.
      threads: for the backend.

    All memory that grows with the window is allocated here. Not thread-safe: one session, one thread.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | Backend = "cpu",
        policy: str = "rebuild",
        window_turns: int | None = None,
        max_reply_tokens: int | None = None,
        sampling: Sampling | None = None,
        threads: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        manifest = bundle.manifest
        if policy not in POLICIES:
            raise UsageError(f"Policy `{policy}` is not available in this version", hint="Use `--policy rebuild`")
        self.window_turns = _at_least_one("window", manifest.stream.window_turns, window_turns)
        self.max_reply_tokens = _at_least_one("reply length", manifest.stream.max_reply_tokens, max_reply_tokens)
        self._clock = clock or SystemClock()
        self._tokenizer = Tokenizer(bundle.file(TOKENIZER_FILE))
        self._conversation = Conversation(self._tokenizer, manifest.protocol)
        self._states = StateReader(manifest.tokens)
        self._sampling = sampling or Sampling()
        self._sampler = Sampler(self._sampling)
        loaded = load_backend(backend, bundle, threads=threads) if isinstance(backend, str) else backend
        self._vision = VisionEncoder(manifest, loaded)
        plan = plan_cache(manifest, self._conversation, self.window_turns, self.max_reply_tokens)
        self._decoder = Decoder(manifest, bundle.file(manifest.embedding.file), loaded, plan.capacity_tokens)
        self._history = History(self.window_turns + 1, manifest.max_visual_tokens, manifest.decoder_facts.hidden_size)
        self._decoder.prefill([self._conversation.system_ids])
        self._after_system = self._decoder.kv_cache.mark()
        self._window = RebuildWindow(
            self._conversation,
            self._history,
            self._decoder.kv_cache,
            self._after_system,
            window_turns=self.window_turns,
            reserve_tokens=self.max_reply_tokens,
        )
        self._asked: list[str] = []
        self._questions: list[OpenQuestion] = []
        self._pending_ids: list[int] = []
        self._last_t: int | None = None

    @property
    def kv_tokens(self) -> int:
        """Rows of the KV cache in use."""
        return self._decoder.kv_cache.length

    @property
    def kv_capacity_tokens(self) -> int:
        """Rows of the KV cache allocated."""
        return self._decoder.kv_cache.capacity_tokens

    @property
    def position(self) -> int:
        """Rotary position of the next token."""
        return self._decoder.kv_cache.position

    @property
    def kept_turns(self) -> int:
        """Turns in the window."""
        return len(self._history)

    def ask(self, text: str) -> None:
        """Ask a question; it joins the next pushed turn and stays open.

        Raises:
          QuestionError: empty, or too long to stay in the window.
        """
        self.check_question(text)
        self._asked.append(text.strip())

    def check_question(self, text: str) -> None:
        """Refuse a question that `ask` would refuse.

        Raises:
          QuestionError: empty, or too long, with those that wait for the next turn, to stay in the window.
        """
        question = text.strip()
        if not question:
            raise QuestionError("A question is empty", hint="Ask something, for example `Describe each event.`")
        tokens = self._conversation.question_tokens([OpenQuestion(0, q) for q in (*self._asked, question)])
        if tokens > MAX_QUESTION_TOKENS:
            raise QuestionError(
                f"The questions of one turn should have at most {MAX_QUESTION_TOKENS} tokens to stay in the window, "
                f"found {tokens}",
                hint="Ask something shorter",
            )

    def push(self, pixels: np.ndarray, t: int, on_text: Callable[[str], None] | None = None) -> Turn:
        """Give the model the frame of stream second `t` and return what it decided.

        Args:
          pixels: (H, W, 3) uint8 RGB, any size.
          t: whole stream second of the frame; later than the turn before.
          on_text: called with each new piece of a reply, whole characters only, while it is generated.

        Raises:
          FrameError: `pixels` is not such an array. The session is as before.
          UsageError: `t` does not advance. The session is as before.
          BackendError: the backend failed; the session cannot go on.
        """
        t = self._check_t(t)
        stopwatch = Stopwatch(self._clock)
        resized = self._vision.resize(pixels)
        patches = self._vision.patches(resized)
        stopwatch.lap("preprocess")
        frame = self._vision.encode(resized, patches)
        stopwatch.lap("encode")
        question = self._take_questions(t)
        newest = self._history.append(t, question, frame)
        self._last_t = t
        segments, evicted_turns = self._window.prompt_for(newest, self._pending_ids, self._questions)
        logits = self._decoder.prefill(segments).copy() if segments else None
        stopwatch.lap("append")
        if not self._questions:
            logits = None  # as in the official loop, the model is not asked before there is a question
        reply = self._reply(newest, logits, on_text)
        stopwatch.lap("decode")
        return Turn(
            t=t,
            state=reply.state,
            text=reply.text,
            logits=logits,
            question=question,
            visual_tokens=len(frame.embeds),
            reply_tokens=len(reply.ids),
            truncated=reply.truncated,
            off_protocol=reply.off_protocol,
            evicted_turns=evicted_turns,
            kv_tokens=self.kv_tokens,
            timing_ms=stopwatch.laps_ms("turn"),
        )

    def reset(self) -> None:
        """Forget the whole conversation, questions included; nothing is allocated again."""
        self._window.reset()
        self._history.clear()
        self._sampler = Sampler(self._sampling)
        self._asked, self._questions, self._pending_ids = [], [], []
        self._last_t = None

    def _check_t(self, t: int) -> int:
        try:
            second = operator.index(t)
        except TypeError:
            raise UsageError(f"A stream second should be a whole number, found {t!r}") from None
        if second < 0 or (self._last_t is not None and second <= self._last_t):
            raise UsageError(f"Stream seconds should advance from 0: found {second} after {self._last_t}")
        return second

    def _reply(self, turn: KeptTurn, logits: np.ndarray | None, on_text: Callable[[str], None] | None) -> Reply:
        """The model's reply to `turn`; silence where there are no logits."""
        reply = Reply(self._decoder, self._tokenizer, self._states, self._sampler, self.max_reply_tokens)
        try:
            if logits is None:
                reply.stay_silent()
            else:
                reply.run(logits, on_text)
        finally:  # also when `on_text` raises: what was said so far is part of the conversation
            turn.reply_ids = reply.ids
            self._pending_ids = [*reply.unfed_ids, *self._conversation.closing_ids]
        return reply

    def _take_questions(self, t: int) -> str:
        """What was asked since the last turn, as this turn's question; it stays open."""
        asked, self._asked = self._asked, []
        self._questions += [OpenQuestion(t, text) for text in asked]
        while self._conversation.question_tokens(self._questions) > MAX_QUESTION_TOKENS:
            self._questions.pop(0)
        return "\n".join(asked)


def _at_least_one(name: str, default: int, chosen: int | None) -> int:
    value = default if chosen is None else chosen
    if value < 1:
        raise UsageError(f"The {name} should be at least 1, found {value}")
    return value

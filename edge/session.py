"""One stream's conversation: a frame goes in, the model's decision comes out.

Owns the order of a turn. Does not know where frames come from, nor threads, nor the wall clock; time is read from the
`Clock` that it is given, for measurement only.

Protocol: Streamo's `inference.py`. The state is read from the logits that prefilling the turn already gives; silence
and standby need no decode step, and the tokens that close a reply go in front of the next turn's prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from edge.backends import load_backend
from edge.backends.base import Backend
from edge.bundle import Bundle
from edge.capacity import CachePlan, check_fits, out_of_memory, plan_cache
from edge.clock import Clock, Stopwatch, SystemClock
from edge.contract import TOKENIZER_FILE, Manifest
from edge.conversation import Conversation
from edge.decoder import Decoder
from edge.errors import UsageError
from edge.history import History
from edge.memory import available_bytes
from edge.policy import SLIDE, check_policy, chosen_policy
from edge.questions import Questions
from edge.rebuild import RebuildWindow
from edge.reply import Reply, StateReader
from edge.sampling import Sampler, Sampling
from edge.slide import SlideWindow
from edge.tokenizer import Tokenizer
from edge.turn import Turn
from edge.vision import VisionEncoder
from edge.window import Window


class StreamSession:
    """A streaming model following one camera.

    Args:
      bundle: from `edge.open_bundle`.
      backend: `cpu`, or a loaded `Backend` of the caller's own.
      policy: what happens when the window is full. `slide` cuts the oldest turn out of the cache, where everything else
        stays, at constant cost; open questions stay in front of the first kept turn. `rebuild` computes what the
        official loop computes: it prefills the window again from cached visual tokens, with positions from 0. Until
        the window is full for the first time both give the same logits. None is `slide` where the backend can, else
        `rebuild`.
      window_turns: turns kept, the present one included; None takes the bundle's default.
      max_reply_tokens: a longer reply is cut and closed, so that it never stalls the stream.
      sampling: how reply tokens are chosen; greedy by default. The decision to speak is always the most likely token.
      threads: for the backend.
      require_gpu, check_first_run: of a backend given by name; see `load_backend`.

    Attributes:
      policy: the one in use.
      placement: where each component runs, in words; empty where the backend does not tell.
      notices: sentences for the user about what the backend could not have as it should be.

    All memory that grows with the window is allocated here. Not thread-safe: one session, one thread.

    Raises:
      UsageError: an option makes no sense, or the backend cannot do it.
      MemoryBudgetError: the window does not fit; names the bytes wanted and free, and the window that would fit.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | Backend = "cpu",
        policy: str | None = None,
        window_turns: int | None = None,
        max_reply_tokens: int | None = None,
        sampling: Sampling | None = None,
        threads: int | None = None,
        require_gpu: bool = False,
        check_first_run: bool = True,
        clock: Clock | None = None,
    ) -> None:
        manifest = bundle.manifest
        check_policy(policy)
        self.window_turns = _at_least_one("window", manifest.stream.window_turns, window_turns)
        self.max_reply_tokens = _at_least_one("reply length", manifest.stream.max_reply_tokens, max_reply_tokens)
        self._clock = clock or SystemClock()
        self._tokenizer = Tokenizer(bundle.file(TOKENIZER_FILE))
        self._conversation = Conversation(self._tokenizer, manifest.protocol)
        self._states = StateReader(manifest.tokens)
        self._sampling = sampling or Sampling()
        self._sampler = Sampler(self._sampling)
        self._questions = Questions(self._conversation.question_tokens)
        loaded = (
            load_backend(backend, bundle, threads=threads, require_gpu=require_gpu, check=check_first_run)
            if isinstance(backend, str)
            else backend
        )
        self.policy = chosen_policy(policy, evicts_in_place=loaded.evicts_in_place)
        self._vision = VisionEncoder(manifest, loaded)
        self.notices: list[str] = list(getattr(loaded, "notices", []))
        self.placement: dict[str, str] = dict(getattr(loaded, "placement", {}))
        plan = plan_cache(
            manifest,
            self._conversation,
            self.window_turns,
            self.max_reply_tokens,
            policy=self.policy,
            evicts_in_place=loaded.evicts_in_place,
        )
        check_fits(plan, free_bytes=getattr(loaded, "free_bytes", available_bytes)())
        with out_of_memory(plan):
            self._decoder = Decoder(manifest, bundle.file(manifest.embedding.file), loaded, plan.capacity_tokens)
            self._decoder.prefill([self._conversation.system_ids])
            self._window = self._make_window(manifest, plan)
        self._last_t: int | None = None

    def _make_window(self, manifest: Manifest, plan: CachePlan) -> Window:
        turns, reserve_tokens = plan.window_turns, plan.longest_reply_tokens
        parts = (self._conversation, self._decoder.kv_cache, self._decoder.kv_cache.mark())
        if self.policy == SLIDE:
            return SlideWindow(*parts, window_turns=turns, reserve_tokens=reserve_tokens)
        history = History(turns + 1, manifest.max_visual_tokens, manifest.decoder_facts.hidden_size)
        return RebuildWindow(*parts, history, window_turns=turns, reserve_tokens=reserve_tokens)

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
        """Rotary position of the next token, as the model sees it: nothing is missing in front of it."""
        return self._decoder.kv_cache.position

    @property
    def rotated_position(self) -> int:
        """Rotary position that the next token's key is written with; cached keys are never turned again."""
        return self._decoder.kv_cache.rotated_position

    @property
    def kept_turns(self) -> int:
        """Turns in the window."""
        return len(self._window)

    @property
    def open_questions(self) -> dict[int, str]:
        """The questions that are not closed, by number, oldest first; those included that wait for the next turn."""
        return {question.number: question.text for question in self._questions.open_or_asked}

    def ask(self, text: str) -> int:
        """Ask a question; it joins the next pushed turn and stays open until it is closed. Returns its number.

        Raises:
          QuestionError: empty, or too long to stay in the window.
        """
        return self._questions.ask(text)

    def close_question(self, question: int | str) -> str:
        """Close a question, by its number or its text; the model need not mind it any longer. Returns its text.

        It leaves the window with its turn, or with the next turn if its own has left. With no question open the model
        is not asked, as before the first one.

        Raises:
          QuestionError: no such question is open.
        """
        return self._questions.close(question).text

    def check_question(self, text: str) -> None:
        """Refuse a question that `ask` would refuse.

        Raises:
          QuestionError: empty, or too long, with those that wait for the next turn, to stay in the window.
        """
        self._questions.check(text)

    def push(self, pixels: Any, t: int, on_text: Callable[[str], None] | None = None) -> Turn:
        """Give the model the frame of stream second `t` and return what it decided.

        Args:
          pixels: (H, W, 3) uint8 RGB, any size: an array of numpy, or anything with DLPack or the CUDA array interface;
            a frame on the backend's GPU stays there, and may be an `edge.Nv12Frame`.
          t: whole stream second of the frame; later than the turn before.
          on_text: called with each new piece of a reply, whole characters only, while it is generated.

        Raises:
          FrameError: `pixels` is no such frame. The session is as before.
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
        joined = self._questions.join_turn()
        asked = bool(self._questions.open)
        self._last_t = t
        prompt = self._window.begin_turn(t, joined, frame, asked=asked)
        logits = np.array(self._decoder.prefill(prompt.segments)) if prompt.segments else None
        stopwatch.lap("append")
        if not asked:
            logits = None  # as in the official loop, the model is not asked before there is a question
        reply = self._reply(logits, on_text)
        stopwatch.lap("decode")
        return Turn(
            t=t,
            state=reply.state,
            text=reply.text,
            logits=logits,
            question="\n".join(question.text for question in joined),
            visual_tokens=len(frame.embeds),
            reply_tokens=len(reply.ids),
            truncated=reply.truncated,
            off_protocol=reply.off_protocol,
            evicted_turns=prompt.evicted_turns,
            kv_tokens=self.kv_tokens,
            timing_ms=stopwatch.laps_ms("turn"),
        )

    def reset(self) -> None:
        """Forget the whole conversation, questions included; nothing is allocated again."""
        self._window.reset()
        self._questions.clear()
        self._sampler = Sampler(self._sampling)
        self._last_t = None

    def _check_t(self, t: int) -> int:
        try:
            second = operator.index(t)
        except TypeError:
            raise UsageError(f"A stream second should be a whole number, found {t!r}") from None
        if second < 0 or (self._last_t is not None and second <= self._last_t):
            raise UsageError(f"Stream seconds should advance from 0: found {second} after {self._last_t}")
        return second

    def _reply(self, logits: np.ndarray | None, on_text: Callable[[str], None] | None) -> Reply:
        """The model's reply to the turn; silence where there are no logits."""
        reply = Reply(self._decoder, self._tokenizer, self._states, self._sampler, self.max_reply_tokens)
        try:
            if logits is None:
                reply.stay_silent()
            else:
                reply.run(logits, on_text)
        finally:  # also when `on_text` raises: what was said so far is part of the conversation
            self._window.end_turn(reply.ids, reply.unfed_ids)
        return reply


def _at_least_one(name: str, default: int, chosen: int | None) -> int:
    value = default if chosen is None else chosen
    if value < 1:
        raise UsageError(f"The {name} should be at least 1, found {value}")
    return value

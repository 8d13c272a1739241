"""How many rows of the KV cache a stream needs, what they weigh, and whether that fits. The one place that decides it.

Owns the estimate; allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from edge.bundle import Bundle
from edge.contract import TOKENIZER_FILE, Manifest
from edge.conversation import Conversation
from edge.errors import MemoryBudgetError
from edge.memory import available_bytes, bytes_text
from edge.policy import REBUILD, SLIDE
from edge.questions import MAX_QUESTION_TOKENS
from edge.tokenizer import Tokenizer

REPLY_TOKENS_PER_TURN = 16
"""Room for replies, on the average over a window; where they are longer, fewer turns are kept."""
LATEST_T = 99_999
"""A turn's text is measured with the tag of a stream that is a day old; later ones live on the room for replies."""


@dataclass(frozen=True)
class CachePlan:
    """Rows of the KV cache by what they are for, for a window of the largest frames.

    Attributes:
      turn_interval_s: stream seconds from one turn's frame to the next one's, at the protocol's own rate.
      turn_text_tokens: a turn's text with its silent reply.
      longest_reply_tokens: rows that one reply can take.
      kv_dtypes: of the cache, one a layer.
      frame_bytes: what one turn's kept visual tokens take beside the cache; 0 where none are kept.
    """

    window_turns: int
    turn_interval_s: int
    system_tokens: int
    turn_text_tokens: int
    visual_tokens: int
    question_tokens: int
    longest_reply_tokens: int
    kv_dtypes: tuple[str, ...]
    bytes_per_token: int
    frame_bytes: int

    @property
    def turn_tokens(self) -> int:
        """A silent turn."""
        return self.turn_text_tokens + self.visual_tokens

    @property
    def reply_tokens(self) -> int:
        """Room for the replies of the window."""
        usual = min(REPLY_TOKENS_PER_TURN, self.longest_reply_tokens)
        return 2 * self.longest_reply_tokens + self.window_turns * usual

    @property
    def capacity_tokens(self) -> int:
        """Rows to allocate."""
        window = self.window_turns * self.turn_tokens
        return self.system_tokens + window + self.question_tokens + self.reply_tokens

    @property
    def window_s(self) -> int:
        """Stream seconds that the window holds, at the protocol's own rate."""
        return self.window_turns * self.turn_interval_s

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.capacity_tokens * self.bytes_per_token

    @property
    def total_bytes(self) -> int:
        """The KV cache and the kept visual tokens."""
        return self.kv_bytes + (self.window_turns + 1) * self.frame_bytes

    @property
    def fixed_bytes(self) -> int:
        """What a window without any turn would take."""
        return replace(self, window_turns=0).total_bytes

    @property
    def turn_bytes(self) -> int:
        """What each turn of the window adds."""
        return replace(self, window_turns=1).total_bytes - self.fixed_bytes

    def turns_that_fit(self, free_bytes: int) -> int:
        """The longest window that takes no more than `free_bytes`; 0 if there is none."""
        return max(0, (free_bytes - self.fixed_bytes) // self.turn_bytes)


def plan_cache(
    manifest: Manifest,
    conversation: Conversation,
    window_turns: int,
    max_reply_tokens: int,
    *,
    policy: str,
    evicts_in_place: bool,
) -> CachePlan:
    """The plan for a window of `window_turns` turns.

    Args:
      policy: `rebuild` keeps the visual tokens of every turn, to say them again.
      evicts_in_place: the backend does; else it runs the stock graph, whose cache is float32.
    """
    tokens = manifest.tokens
    return CachePlan(
        window_turns=window_turns,
        turn_interval_s=manifest.protocol.turn_interval_s,
        system_tokens=len(conversation.system_ids),
        turn_text_tokens=conversation.turn_text_tokens(LATEST_T) + len(tokens.silence) + len(conversation.closing_ids),
        visual_tokens=manifest.max_visual_tokens,
        question_tokens=2 * MAX_QUESTION_TOKENS,  # the open ones, and as many closed ones whose turns are still kept
        longest_reply_tokens=max(max_reply_tokens, *map(len, (tokens.silence, tokens.standby, tokens.response))),
        kv_dtypes=manifest.kv_dtypes if evicts_in_place else ("float32",) * manifest.decoder_facts.layers,
        bytes_per_token=manifest.kv_bytes_per_token if evicts_in_place else manifest.stock_kv_bytes_per_token,
        frame_bytes=manifest.max_visual_tokens * manifest.decoder_facts.hidden_size * 4 * (policy == REBUILD),
    )


def plan_for_bundle(
    bundle: Bundle,
    window_turns: int | None = None,
    max_reply_tokens: int | None = None,
    *,
    policy: str = SLIDE,
    evicts_in_place: bool = True,
) -> CachePlan:
    """The plan that a session on `bundle` would make; None takes the bundle's defaults. Cost: reads the tokenizer."""
    manifest = bundle.manifest
    stream = manifest.stream
    return plan_cache(
        manifest,
        Conversation(Tokenizer(bundle.file(TOKENIZER_FILE)), manifest.protocol),
        stream.window_turns if window_turns is None else window_turns,
        stream.max_reply_tokens if max_reply_tokens is None else max_reply_tokens,
        policy=policy,
        evicts_in_place=evicts_in_place,
    )


def check_fits(plan: CachePlan, weights_bytes: int = 0, *, free_bytes: int | None) -> None:
    """Refuse a window that there is no memory for, before anything is allocated.

    Args:
      weights_bytes: what has to be loaded beside the window.
      free_bytes: memory where the cache will be; None if unknown.

    Raises:
      MemoryBudgetError: names the bytes wanted and free, and the longest window that fits.
    """
    if free_bytes is not None and plan.total_bytes + weights_bytes > free_bytes:
        raise _too_large(plan, weights_bytes, free_bytes)


@contextmanager
def out_of_memory(plan: CachePlan) -> Iterator[None]:
    """Tell a failed allocation of the window as what it is.

    Raises:
      MemoryBudgetError: in place of MemoryError.
    """
    try:
        yield
    except MemoryError:
        raise _too_large(plan, 0, available_bytes()) from None


def _too_large(plan: CachePlan, weights_bytes: int, free_bytes: int | None) -> MemoryBudgetError:
    fits = plan.turns_that_fit(free_bytes - weights_bytes) if free_bytes is not None else plan.window_turns // 2
    fits = min(fits, plan.window_turns - 1)
    return MemoryBudgetError(
        f"A window of {plan.window_turns} turns needs {bytes_text(plan.total_bytes + weights_bytes)}: "
        f"{bytes_text(plan.turn_bytes)} a turn and {bytes_text(weights_bytes + plan.fixed_bytes)} for "
        f"{'weights, ' if weights_bytes else ''}questions and replies; "
        f"{'too little' if free_bytes is None else bytes_text(free_bytes)} is free",
        hint=f"Use `--window {fits}` or less"
        if fits
        else "Use a smaller `--max-reply-tokens`, or a bundle with smaller weights",
    )

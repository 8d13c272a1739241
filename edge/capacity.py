"""How many rows of the KV cache a stream needs, and what they weigh. The one place where that is decided.

Owns the estimate; allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge.bundle import Bundle
from edge.contract import TOKENIZER_FILE, Manifest
from edge.tokenizer import Tokenizer
from edge.window import Conversation

MAX_QUESTION_TOKENS = 512
"""Open questions stay in the window for ever, so their tokens are bounded: beyond this the oldest is forgotten."""
REPLY_TOKENS_PER_TURN = 16
"""Room for replies, on the average over a window; where they are longer, fewer turns are kept."""
LATEST_T = 99_999
"""A turn's text is measured with the tag of a stream that is a day old."""


@dataclass(frozen=True)
class CachePlan:
    """Rows of the KV cache by what they are for, for a window of the largest frames.

    Attributes:
      turn_text_tokens: a turn's text with its silent reply.
      frame_bytes: what one turn's kept visual tokens take beside the cache.
    """

    window_turns: int
    system_tokens: int
    turn_text_tokens: int
    visual_tokens: int
    question_tokens: int
    reply_tokens: int
    bytes_per_token: int
    frame_bytes: int

    @property
    def turn_tokens(self) -> int:
        """A silent turn."""
        return self.turn_text_tokens + self.visual_tokens

    @property
    def capacity_tokens(self) -> int:
        """Rows to allocate."""
        window = self.window_turns * self.turn_tokens
        return self.system_tokens + window + self.question_tokens + self.reply_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.capacity_tokens * self.bytes_per_token

    @property
    def total_bytes(self) -> int:
        """The KV cache and the kept visual tokens."""
        return self.kv_bytes + (self.window_turns + 1) * self.frame_bytes


def plan_cache(manifest: Manifest, conversation: Conversation, window_turns: int, max_reply_tokens: int) -> CachePlan:
    """The plan for a window of `window_turns` turns."""
    return CachePlan(
        window_turns=window_turns,
        system_tokens=len(conversation.system_ids),
        turn_text_tokens=conversation.turn_text_tokens(LATEST_T)
        + len(manifest.tokens.silence)
        + len(conversation.closing_ids),
        visual_tokens=manifest.max_visual_tokens,
        question_tokens=2 * MAX_QUESTION_TOKENS,  # at the turns where they were asked, and again at the first kept
        reply_tokens=2 * max_reply_tokens + window_turns * min(REPLY_TOKENS_PER_TURN, max_reply_tokens),
        bytes_per_token=manifest.kv_bytes_per_token,
        frame_bytes=manifest.max_visual_tokens * manifest.decoder_facts.hidden_size * 4,
    )


def plan_for_bundle(bundle: Bundle, window_turns: int | None = None, max_reply_tokens: int | None = None) -> CachePlan:
    """The plan that a session on `bundle` would make; None takes the bundle's defaults. Cost: reads the tokenizer."""
    manifest = bundle.manifest
    conversation = Conversation(Tokenizer(bundle.file(TOKENIZER_FILE)), manifest.protocol)
    stream = manifest.stream
    return plan_cache(
        manifest,
        conversation,
        stream.window_turns if window_turns is None else window_turns,
        stream.max_reply_tokens if max_reply_tokens is None else max_reply_tokens,
    )

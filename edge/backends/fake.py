"""A backend without a model: it says what it is told to, and remembers what it was given.

For tests of sessions and applications, ours and users': no graph, no weights, milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.backends.base import CacheView
from edge.contract import Manifest
from edge.decoder import MAX_PREFILL_TOKENS


@dataclass(frozen=True)
class DecoderCall:
    """What one call of the decoder graph was given."""

    tokens: int
    cache_length: int  # tokens that the new ones look back at


class ScriptedBackend:
    """Answers each prefilled turn with the next reply of a script, token by token.

    Args:
      replies: token ids of each reply, state included; behind a reply's last token comes `<|im_end|>`. The last reply
        is repeated when the script is over.

    The first prefill of a session is its system prompt and takes no reply.
    """

    evicts_in_place = True

    def __init__(self, manifest: Manifest, replies: Sequence[Sequence[int]]) -> None:
        self._manifest = manifest
        self._replies = [[*reply, manifest.tokens.im_end] for reply in replies]
        self._turn = -1
        self._spoken = 0
        self.calls: list[DecoderCall] = []
        self.encoded_frames = 0
        self.capacity_tokens = 0

    def allocate_cache(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens

    def encode(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        self.encoded_frames += 1
        tokens = rows * columns // self._manifest.preprocess.merge_size**2
        return np.full((tokens, self._manifest.decoder_facts.hidden_size), patches.mean(), np.float32)

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView
    ) -> np.ndarray:
        self.calls.append(DecoderCall(len(inputs_embeds), int(view.spans[:, 1].sum())))
        logits = np.zeros(self._manifest.decoder_facts.vocab_size, np.float32)
        if len(inputs_embeds) == MAX_PREFILL_TOKENS:
            return logits  # the rest of the prompt follows
        if len(inputs_embeds) > 1:
            self._turn += 1
            self._spoken = 0
        else:
            self._spoken += 1
        reply = self._replies[min(max(self._turn - 1, 0), len(self._replies) - 1)]
        logits[reply[min(self._spoken, len(reply) - 1)]] = 1
        return logits

"""The language model as two verbs: `prefill` many tokens, `decode_step` one.

Owns the order token ids -> embeddings -> positions -> cache rows -> logits. Does not know what
the tokens mean (see `session`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np

from edge.backends.base import Backend, CacheView
from edge.contract import Manifest
from edge.embeddings import Embeddings
from edge.kv_cache import KVCache, Placement
from edge.rope import decoder_rope, image_positions, text_positions
from edge.sampling import Logits

MAX_PREFILL_TOKENS = 512
"""Longest run of tokens given to the graph at once: attention scores take T x depth numbers a head."""


class FrameTokens:
    """A frame's visual tokens and the grid they came from.

    Attributes:
      embeds: (N, W) float32: an array, or rows that the backend keeps on its device until the next frame.
      rows, columns: visual tokens down and across; N = rows * columns.
    """

    __slots__ = ("columns", "embeds", "rows")

    def __init__(self, embeds: Any, rows: int, columns: int) -> None:
        self.embeds = embeds
        self.rows = rows
        self.columns = columns


Segment = Union[Sequence[int], FrameTokens]  # noqa: UP007 - evaluated at run time, which Python 3.10 needs spelt so
"""Part of a prompt: text token ids, or a frame."""


class Decoder:
    """The decoder graph with its cache and embedding table.

    Args:
      manifest: the bundle's facts.
      table_path: the embedding table, memory-mapped: rows are read when a token needs them.
      capacity_tokens: size of the KV cache, allocated here, once.
    """

    def __init__(self, manifest: Manifest, table_path: Path, backend: Backend, capacity_tokens: int) -> None:
        facts = manifest.decoder_facts
        self._embeddings = Embeddings(manifest.embedding, table_path)
        self._rope = decoder_rope(facts)
        self._backend = backend
        make_buffer = getattr(backend, "embeds_buffer", None)  # on a device, frames' tokens need not leave it
        shape = (MAX_PREFILL_TOKENS, facts.hidden_size)
        self._embeds: Any = make_buffer(MAX_PREFILL_TOKENS) if make_buffer else np.empty(shape, np.float32)
        self._positions = np.empty((3, MAX_PREFILL_TOKENS), np.int64)
        self._tabled_shifts: tuple[int, ...] | None = None
        backend.allocate_cache(capacity_tokens)
        self.kv_cache = KVCache(capacity_tokens)

    def prefill(self, segments: Sequence[Segment]) -> Logits:
        """Append a prompt to the cache and return the logits after its last token.

        Args:
          segments: text token ids and frames, in order; at least one token in all.

        Returns:
          (V,) float32, an array or on the backend's device; valid until the next call.

        Raises:
          MemoryBudgetError: the cache has too few rows left; rows written so far stay.

        Cost: one graph call for every 512 tokens.
        """
        filled = 0
        next_position = first_position = self.kv_cache.rotated_position
        for segment in segments:
            embeds, positions, advance = self._lay_out(segment, next_position)
            next_position += advance
            start = 0
            while start < len(embeds):
                if filled == MAX_PREFILL_TOKENS:
                    self._run(filled, advance=0)
                    filled = 0
                count = min(len(embeds) - start, MAX_PREFILL_TOKENS - filled)
                self._embeds[filled : filled + count] = embeds[start : start + count]
                self._positions[:, filled : filled + count] = positions[:, start : start + count]
                filled += count
                start += count
        if not filled:
            raise ValueError("a prompt needs at least one token")
        return self._run(filled, advance=next_position - first_position)

    def decode_step(self, token_id: int) -> Logits:
        """Append one text token and return the logits after it, as `prefill` does."""
        return self.prefill([[token_id]])

    def _lay_out(self, segment: Segment, position: int) -> tuple[Any, np.ndarray, int]:
        """Embeddings (n, W), positions (3, n) and how far the position advances."""
        if isinstance(segment, FrameTokens):
            positions = image_positions(position, segment.rows, segment.columns)
            return segment.embeds, positions, max(segment.rows, segment.columns)
        count = len(segment)
        return self._embeddings.rows(segment), text_positions(position, count), count

    def _run(self, count: int, advance: int) -> Logits:
        cos, sin = self._rope.tables(self._positions[:, :count])
        view = self._view(self.kv_cache.append(count, advance))
        return self._backend.run_decoder(self._embeds[:count], cos, sin, view)

    def _view(self, placement: Placement) -> CacheView:
        """A placement with the rotary rows of its runs, which are computed again only when something has moved."""
        if placement.run_shifts is not self._tabled_shifts:
            self._tabled_shifts = placement.run_shifts
            shifts = np.array(placement.run_shifts, np.int64)
            self._run_tables = self._rope.tables(np.broadcast_to(shifts, (3, len(shifts))))
        return CacheView(placement.new_slots, placement.spans, *self._run_tables)

"""A backend between a session and a real one: it knows which token is in which row, and decides what is said.

For tests of what the cache holds. Works with any inner backend; `logits_of_a_fresh_cache` also needs its
`cache_arrays()` (see `numpy_decoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench.kernel_cases import rotate
from edge.backends.base import CacheView
from edge.bundle import Bundle

IMAGE = -1
"""Stands for a visual token where ids are compared."""


class Witness:
    """Answers turn number n, counted by frames, with `replies[n % len(replies)]`, whatever the inner backend says.

    Args:
      replies: token ids of each reply, state included, without a newline.
      grid: visual tokens down and across, of every frame.
      inner: computes the logits; None where they do not matter.

    Attributes:
      kept: token ids in the cache, in the order of the conversation; `IMAGE` for visual tokens.
      logits: what the inner backend gave for the newest token.
      watching: whether the cache is copied before each call, for `logits_of_a_fresh_cache`.
      resting: the inner backend is not called; for turns that will have left before anything is compared.
    """

    evicts_in_place = True

    def __init__(
        self, bundle: Bundle, replies: Sequence[Sequence[int]], grid: tuple[int, int] = (1, 1), inner: Any = None
    ) -> None:
        manifest = bundle.manifest
        self._id_of_row = _ids_by_row(bundle.file(manifest.embedding.file), manifest.embedding.columns)
        self._facts = manifest.decoder_facts
        self._replies = [[*reply, manifest.tokens.im_end] for reply in replies]
        self._newline: int | None = None
        self._spoken = 0
        self.grid = grid
        self.inner = inner
        self.frames = 0
        self.calls = 0
        self.logits = np.zeros(0)
        self.watching = True
        self.resting = False
        self.most_spans = self.most_runs = 0

    def allocate_cache(self, capacity_tokens: int) -> None:
        half = self._facts.head_dim // 2
        self._ids = np.zeros(capacity_tokens, np.int64)
        self._angles = np.zeros((2, capacity_tokens, half))
        self._seen: tuple[np.ndarray, CacheView] | None = None
        if self.inner:
            self.inner.allocate_cache(capacity_tokens)

    def encode(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        self.frames += 1
        if self.inner:
            return self.inner.encode(patches, rows, columns)
        tokens = rows * columns // 4
        return np.full((tokens, self._facts.hidden_size), 1000 + self.frames, np.float32)

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView
    ) -> np.ndarray:
        rows = _rows_of(view)
        assert not set(rows) & set(view.new_slots.tolist()), "a row is never taken twice"
        assert len(set(rows)) == len(rows) and len(set(view.new_slots.tolist())) == len(view.new_slots)
        ids = [self._id_of_row.get(row.tobytes(), IMAGE) for row in inputs_embeds]
        self._ids[view.new_slots] = ids
        self._angles[0, view.new_slots], self._angles[1, view.new_slots] = rope_cos, rope_sin
        self._rows = [*rows, *view.new_slots.tolist()]
        self._embeds, self._new = inputs_embeds.copy(), len(ids)
        self.calls += 1
        self.most_spans, self.most_runs = max(self.most_spans, len(view.spans)), max(self.most_runs, len(view.run_cos))
        if self.inner and not self.resting and self.watching:
            self._before = [(keys[:, rows].copy(), values[:, rows].copy()) for keys, values in self._inner_caches()]
        if self.inner and not self.resting:
            self.logits = self.inner.run_decoder(inputs_embeds, rope_cos, rope_sin, view).copy()
        return self._decided(ids)

    @property
    def kept(self) -> list[int]:
        return self._ids[self._rows].tolist()

    def logits_of_a_fresh_cache(self, other: Any, theta: float, sections: Sequence[int]) -> np.ndarray:
        """What the last call would have given in a cache that had never evicted anything.

        Args:
          other: a second backend with the same weights. Its cache is filled, from row 0 on, with the keys and values
            that the last call looked back at. Each key is turned back by the angles that it was written with and
            turned again, in double, by those of its place in the kept conversation, counted from its tokens alone.
        """
        before = self._rows[: len(self._rows) - self._new]
        other.allocate_cache(len(self._rows))
        positions = self._positions()
        half = self._facts.head_dim // 2
        axis = np.repeat(np.arange(3), sections)
        angles = positions[axis].T * theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)
        count = len(before)
        for (keys, values), (old_keys, old_values) in zip(other.cache_arrays(), self._before, strict=True):
            raw = rotate(old_keys.astype(np.float64), self._angles[0, before], -self._angles[1, before])
            keys[:, :count] = rotate(raw, cos[:count], sin[:count])
            values[:, :count] = old_values
        view = CacheView(
            np.arange(count, len(self._rows), dtype=np.int32),
            np.array([[0, count, 0]], np.int32),
            np.ones((1, half), np.float32),
            np.zeros((1, half), np.float32),
        )
        new_cos, new_sin = (np.ascontiguousarray(x[count:], np.float32) for x in (cos, sin))
        return other.run_decoder(self._embeds, new_cos, new_sin, view)

    def _positions(self) -> np.ndarray:
        """(3, tokens) positions of the kept conversation, from its ids: text by one, a frame by its longer side."""
        rows, columns = self.grid
        found: list[tuple[int, int, int]] = []
        ids, here, i = self.kept, 0, 0
        while i < len(ids):
            if ids[i] == IMAGE:
                found += [(here, here + row, here + column) for row in range(rows) for column in range(columns)]
                here, i = here + max(rows, columns), i + rows * columns
            else:
                found.append((here, here, here))
                here, i = here + 1, i + 1
        return np.array(found).T

    def _inner_caches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        caches = getattr(self.inner, "cache_arrays", None)
        return caches() if caches else []

    def _decided(self, ids: list[int]) -> np.ndarray:
        """One-hot logits: a prompt, whose last token is always the same newline, begins the turn's reply."""
        if self._newline is None:
            self._newline = ids[-1]
        self._spoken = 0 if ids[-1] == self._newline else self._spoken + 1
        reply = self._replies[(self.frames - 1) % len(self._replies)]
        logits = np.zeros(self._facts.vocab_size, np.float32)
        logits[reply[min(self._spoken, len(reply) - 1)]] = 1
        return logits


@lru_cache(maxsize=4)
def _ids_by_row(path: Path, columns: int) -> dict[bytes, int]:
    """Which token an embedding belongs to."""
    return {row.tobytes(): i for i, row in enumerate(np.fromfile(path, np.float32).reshape(-1, columns))}


def _rows_of(view: CacheView) -> list[int]:
    return [row for slot, length, _ in view.spans.tolist() for row in range(slot, slot + length)]

"""What a backend must offer to run a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge.sampling import Logits


@dataclass(frozen=True)
class CacheView:
    """Where T new tokens go in the cache, and which cached tokens they attend to besides each other.

    Attributes:
      new_slots: (T,) int32, all different.
      spans: (S, 3) int32: slot, length, run; in the order of the conversation, none of them new.
      run_cos, run_sin: (R, D / 2) float32: how much further the query is turned for the keys of a run.
    """

    new_slots: np.ndarray
    spans: np.ndarray
    run_cos: np.ndarray
    run_sin: np.ndarray

    def contiguous_length(self) -> int | None:
        """Rows before the new ones, if the cache is simply filled from slot 0 with nothing moved; None otherwise."""
        length, moved = 0, bool(np.any(self.run_sin)) or bool(np.any(self.run_cos < 1))
        for slot, rows, _run in self.spans:
            if slot != length or moved:
                return None
            length += int(rows)
        return length if np.array_equal(self.new_slots, np.arange(length, length + len(self.new_slots))) else None


class Backend(Protocol):
    """The vision and decoder graphs of one bundle, loaded, with one KV cache.

    Not thread-safe: one session, one thread.

    Attributes:
      evicts_in_place: whether `run_decoder` takes any view; if not, only one whose `contiguous_length` is not None.
      identity: what its results may depend on beside the bundle, by name: versions of libraries, the device.
    """

    evicts_in_place: bool
    identity: dict[str, str]

    def allocate_cache(self, capacity_tokens: int) -> None:
        """Allocate all layers' keys and values, once.

        Raises:
          MemoryBudgetError: it does not fit; names the bytes wanted.
        """
        ...

    def encode(self, patches: Any, rows: int, columns: int) -> Any:
        """Visual tokens of one frame: (N, W) float32, in `patchify`'s order; on a device, valid until the next frame.

        Args:
          patches: (P, 3 * patch**2) float32 from `patchify`.
          rows, columns: patches down and across; P = rows * columns.
        """
        ...

    def run_decoder(self, inputs_embeds: Any, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView) -> Logits:
        """Append T tokens where `view` says and return the last one's logits.

        Args:
          inputs_embeds: (T, W) float32: an array, or rows of what the backend's `embeds_buffer` gave, if it has one.

        Returns:
          (V,) float32, an array or on the device; valid until the next call.
        """
        ...

    def cached_rows(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (n, Hkv, D) float32 of some rows of a layer, as its cache holds them. For finding faults."""
        ...

"""What a backend must offer to run a bundle."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Backend(Protocol):
    """The vision and decoder graphs of one bundle, loaded, with one KV cache.

    Not thread-safe: one session, one thread.
    """

    def allocate_cache(self, capacity_tokens: int) -> None:
        """Allocate all layers' keys and values, once.

        Raises:
          MemoryBudgetError: it does not fit; names the bytes wanted.
        """
        ...

    def encode(
        self, patches: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, window_mask: np.ndarray
    ) -> np.ndarray:
        """Visual tokens of one frame: (N, W) float32. Shapes of the arguments as in `contract`."""
        ...

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, cache_length: int
    ) -> np.ndarray:
        """Append T tokens behind the first `cache_length` rows and return the last one's logits.

        Returns:
          (V,) float32; valid until the next call.
        """
        ...

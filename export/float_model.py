"""A checkpoint run in numpy, float32, with the weights of one layer in memory at a time, or all where they fit.

Owns which weights stay in memory. It is what the export asks for the model's own answers and
activations, so that neither needs torch; the parity check does not use it (see `reference`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from edge.contract import VISION_COS, VISION_SIN, WINDOW_MASK
from edge.rope import decoder_rope, frame_tables
from export.checkpoint import Checkpoint
from export.float_layers import (
    Cache,
    decoder_attention,
    decoder_layer,
    gelu,
    rms_norm,
    vision_attention,
    vision_block,
)
from export.tensor_names import DECODER_MAPS, TEXT, VISION_MAPS, VISUAL, Maps
from export.vision import EPSILON as VISION_EPSILON

PIECE_VALUES = 4 << 20
KEEP_BYTES = 2 * 10**9
"""Weights that stay in memory, as float32; a model with more is read again for every pass."""

DECODER_NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}


def fits(checkpoint: Checkpoint, keep_bytes: int = KEEP_BYTES) -> bool:
    """Whether all weights stay in memory."""
    return 4 * checkpoint.parameters <= keep_bytes


class FloatModel:
    """Runs a checkpoint.

    Args:
      keep_bytes: weights to keep in memory; see `KEEP_BYTES`.

    Attributes:
      fits: whether all weights stay in memory, so that a turn at a time costs no more than all at once.
    """

    def __init__(self, checkpoint: Checkpoint, keep_bytes: int = KEEP_BYTES) -> None:
        self.checkpoint = checkpoint
        self.fits = fits(checkpoint, keep_bytes)
        self._kept: dict[str, np.ndarray] = {}
        self._rope = decoder_rope(checkpoint.facts.decoder)

    def embeddings(self, ids: np.ndarray) -> np.ndarray:
        """Rows (T, W) of the embedding table."""
        if self.fits:
            count = self.checkpoint.facts.decoder.vocab_size
            return np.asarray(self._keep("embedding", lambda: self.checkpoint.token_rows(0, count))[ids])
        return self.checkpoint.embeddings(ids)

    def vision(self, frames: list[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
        """Embeddings (N, W) of frames given as (patches, rows, columns), in the order of `preprocess.patchify`."""
        facts = self.checkpoint.facts
        tower, merge = facts.vision, facts.merge_size
        grids = [(rows, columns) for _, rows, columns in frames]
        tables = {
            (rows, columns): frame_tables(rows, columns, tower, merge=merge, patch_size=facts.patch_size)
            for rows, columns in set(grids)
        }
        fold = self._folded_patches()
        values = [patches @ fold for patches, _, _ in frames]
        for block in range(tower.depth):
            prefix = f"{VISUAL}blocks.{block}."
            linear = partial(self._linear, prefix, VISION_MAPS, True, self._layer(prefix))
            vector = partial(self._vector, prefix, {})
            for i, grid in enumerate(grids):
                feeds = tables[grid].feeds
                cos, sin, mask = (feeds[name] for name in (VISION_COS, VISION_SIN, WINDOW_MASK))
                attend = vision_attention(tower, cos, sin, None if block in tower.full_attention_blocks else mask)
                values[i] = vision_block(values[i], attend, linear, vector, VISION_EPSILON)
        return [self._merge(value) for value in values]

    def caches(self) -> list[Cache]:
        """Empty caches, one a layer."""
        return [Cache() for _ in range(self.checkpoint.facts.decoder.layers)]

    def hidden(self, embeds: np.ndarray, positions: np.ndarray, caches: list[Cache]) -> np.ndarray:
        """Append tokens (T, W) at m-RoPE positions (3, T) to the caches; their last hidden states (T, W), normed."""
        facts = self.checkpoint.facts.decoder
        cos, sin = self._rope.tables(positions)
        values = embeds
        for layer, cache in enumerate(caches):
            linear, vector = self.layer(layer)
            attend = decoder_attention(facts, cos, sin, cache)
            values = decoder_layer(values, attend, linear, vector, facts.rms_norm_eps)
        return rms_norm(values, self._read(TEXT + "norm.weight"), facts.rms_norm_eps)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits (n, V) of hidden states (n, W)."""
        if self.fits:
            return np.asarray(hidden @ self._keep("head", self._head).T)
        pieces = self.checkpoint.head_rows(max(1, PIECE_VALUES // hidden.shape[1]))
        return np.concatenate([hidden @ rows.T for rows in pieces], axis=1)

    def layer(self, layer: int) -> tuple[Callable[[str, np.ndarray], np.ndarray], Callable[[str], np.ndarray]]:
        """The maps and norms of a decoder layer, as `float_layers` takes them."""
        prefix = f"{TEXT}layers.{layer}."
        linear = partial(self._linear, prefix, DECODER_MAPS, False, self._layer(prefix))
        return linear, partial(self._vector, prefix, DECODER_NORMS)

    def _layer(self, prefix: str) -> dict[str, np.ndarray]:
        """Where a layer's weights are kept while it runs."""
        return self._kept if self.fits else {}

    def _linear(
        self, prefix: str, maps: Maps, biased: bool, kept: dict[str, np.ndarray], name: str, values: np.ndarray
    ) -> np.ndarray:
        sources = [prefix + part for part in maps[name]]
        key = prefix + name
        if key not in kept:
            parts = [self.checkpoint.read(f"{source}.weight") for source in sources]
            kept[key] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        result = values @ kept[key].T
        if biased or name == "qkv":
            result += np.concatenate([self._read(f"{source}.bias") for source in sources])
        return np.asarray(result)

    def _vector(self, prefix: str, names: dict[str, str], name: str) -> np.ndarray:
        return self._read(f"{prefix}{names.get(name, name)}.weight")

    def _read(self, name: str) -> np.ndarray:
        return self._keep(name, partial(self.checkpoint.read, name))

    def _keep(self, key: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        if not self.fits:
            return read()
        if key not in self._kept:
            self._kept[key] = read()
        return self._kept[key]

    def _head(self) -> np.ndarray:
        return np.concatenate(list(self.checkpoint.head_rows(max(1, PIECE_VALUES))))

    def _folded_patches(self) -> np.ndarray:
        """The patch embedding over equal frames: (channels y x, hidden)."""
        values = self._read(VISUAL + "patch_embed.proj.weight").astype(np.float64).sum(axis=2)
        return np.asarray(values.reshape(len(values), -1).T, np.float32)

    def _merge(self, hidden: np.ndarray) -> np.ndarray:
        prefix, merge = VISUAL + "merger.", self.checkpoint.facts.merge_size
        normed = rms_norm(hidden, self._read(prefix + "ln_q.weight"), VISION_EPSILON)
        values = normed.reshape(-1, normed.shape[1] * merge**2)
        values = gelu(values @ self._read(prefix + "mlp.0.weight").T + self._read(prefix + "mlp.0.bias"))
        return np.asarray(values @ self._read(prefix + "mlp.2.weight").T + self._read(prefix + "mlp.2.bias"))

"""The turns that a bundle carries for its first run elsewhere: the probe, and what the written graphs made of it.

Owns how caches of the stock graph become what the native graph would hold. The file's format is `edge.stored_turns`'s.
"""

from __future__ import annotations

import numpy as np

from edge.rope import decoder_rope
from edge.stored_turns import StoredTurns, sketch, top_of
from export.float_layers import rotate
from export.native import key_offset_name
from export.parity import Computed
from export.probe import Probe
from export.proof import Written


class TurnsRecorder:
    """Watches the stock graphs run the probe: a `proof.Watcher`.

    Attributes:
      content: the file's, once the probe is over.
    """

    def __init__(self, written: Written, probe: Probe, pictures: list[np.ndarray]) -> None:
        self._written, self._probe, self._pictures = written, probe, pictures
        self._rows = probe.ends - 1
        facts = written.checkpoint.facts.decoder
        self._angles = decoder_rope(facts).tables(probe.positions[:, self._rows])
        self._sketches: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.content = b""

    def watch(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Take note of a layer's caches (Hkv, C, D) at the end of the probe."""
        last_keys, last_values = (np.array(cache[:, self._rows], np.float32) for cache in (keys, values))
        if self._written.kv_dtypes is not None and self._written.kv_dtypes[layer] == "int8":
            last_keys -= self._offset_keys(layer)
            last_values -= self._value_bias(layer)
        flat = (rows.transpose(1, 0, 2).reshape(len(self._rows), -1) for rows in (last_keys, last_values))
        keys_sketch, values_sketch = map(sketch, flat)
        self._sketches[layer] = keys_sketch, values_sketch

    def finish(self, found: Computed) -> None:
        """Make the file of what was seen and what the graphs gave."""
        layers = [self._sketches[layer] for layer in sorted(self._sketches)]
        ids, logits, normalisers = top_of(found.logits)
        self.content = StoredTurns(
            pixels=self._pictures,
            parts=self._probe.parts,
            frames=[sketch(frame) for frame in found.frames],
            top_ids=ids,
            top_logits=logits,
            normalisers=normalisers,
            keys=np.stack([keys for keys, _ in layers]),
            values=np.stack([values for _, values in layers]),
        ).to_bytes()

    def _offset_keys(self, layer: int) -> np.ndarray:
        """What an int8 cache leaves out of the keys: (Hkv, n, D), or 0."""
        if key_offset_name(layer) not in self._written.decoder.stored:
            return np.zeros(1, np.float32)
        offset = self._read(key_offset_name(layer))
        return rotate(np.broadcast_to(offset[:, None], (len(offset), len(self._rows), offset.shape[1])), *self._angles)

    def _value_bias(self, layer: int) -> np.ndarray:
        """What an int8 cache leaves out of the values: (Hkv, 1, D)."""
        facts = self._written.checkpoint.facts.decoder
        bias = self._read(f"layers.{layer}.qkv.bias")
        return bias.reshape(-1, facts.head_dim)[facts.num_heads + facts.num_kv_heads :][:, None]

    def _read(self, name: str) -> np.ndarray:
        stored = self._written.decoder.stored[name]
        path = self._written.folder / stored.file
        return np.array(np.memmap(path, np.dtype(stored.dtype), "r", stored.offset, stored.shape), np.float32)

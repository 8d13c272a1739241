"""Random weights for a full-size model's graphs, laid out as a bundle has them.

Owns the shapes and the weights. Which graphs and files they become is `random_bundle`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from apps.bench.qwen_configs import public_config
from apps.demo import CHECKPOINT
from edge.contract import DecoderFacts
from export.config import ModelFacts, facts_from_config
from export.plan import PRECISIONS, QUANTIZED, Plan
from export.quantize import padded_width
from export.weight_store import StoredTensor, WeightFile, stored_bytes

SHAPES: dict[str, ModelFacts] = {
    "qwen2.5-vl-3b": facts_from_config(public_config("3B")),
    "qwen2.5-vl-7b": facts_from_config(public_config("7B")),
    "demo": facts_from_config(json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))),
}
LOUD_PAIRS = 4
PIECE_VALUES = 4 << 20
STEADY_GAIN = 0.2
"""How much a random layer adds to its input, so that numbers stay finite through all of them."""


class RandomWeights:
    """Writes random weights to one file and remembers where they lie, as `export.weight_writer` does with real ones.

    Args:
      block: rows along K that share a scale in quantised weights.
    """

    def __init__(self, file: WeightFile, seed: int, block: int) -> None:
        self._file, self._random, self._block = file, np.random.default_rng(seed), block
        self.stored: dict[str, StoredTensor] = {}

    def vector(self, name: str, count: int, *, around: float = 0.0) -> None:
        """A norm's weight or a bias."""
        values = around + 0.05 * self._random.standard_normal(count, np.float32)
        self.stored[name] = self._file.append("float32", (count,), [values.astype(np.float32)])

    def key_offset(self, name: str, heads: int, width: int) -> None:
        """(Hkv, D) with a bias in a few channel pairs of each head, as Qwen2.5 has it."""
        values = np.zeros((heads, width), np.float32)
        for row in values:
            row[self._random.permutation(width // 2)[:LOUD_PAIRS]] = 100.0
        self.stored[name] = self._file.append("float32", values.shape, [values])

    def matrix(self, name: str, inputs: int, outputs: int, dtype: str) -> None:
        """A linear map (K, N); quantised it has scales (K / block, N) beside it."""
        spread = inputs**-0.5
        if dtype in QUANTIZED:
            scales = (inputs // self._block, outputs)
            self._codes(f"{name}.weight", (inputs, outputs), f"{name}.scale", scales, dtype, STEADY_GAIN * spread)
        else:
            self.table(f"{name}.weight", (inputs, outputs), dtype, spread)

    def table(self, name: str, shape: tuple[int, int], dtype: str, spread: float) -> None:
        """Normal numbers around 0 in rows; in int8 `name`.scale (rows, columns / EMBEDDING_BLOCK) is beside them."""
        from export.weight_writer import EMBEDDING_BLOCK

        if dtype == "int8":
            self._codes(name, shape, f"{name}.scale", (shape[0], shape[1] // EMBEDDING_BLOCK), dtype, spread)
            return
        rows = max(1, PIECE_VALUES // shape[1])
        counts = (min(rows, shape[0] - first) for first in range(0, shape[0], rows))
        pieces = (self._random.standard_normal((count, shape[1]), np.float32) * np.float32(spread) for count in counts)
        self.stored[name] = self._file.append(dtype, shape, (piece.astype(dtype) for piece in pieces))

    def _codes(
        self, name: str, shape: tuple[int, int], scale_name: str, scales: tuple[int, int], dtype: str, spread: float
    ) -> None:
        self.stored[name] = self._file.append(dtype, shape, self._bytes(stored_bytes(dtype, shape)))
        scale = np.float32(spread * 3**0.5 / (8 if dtype == "int4" else 127))
        values = self._random.random(scales, np.float32) * scale + scale
        self.stored[scale_name] = self._file.append("float32", scales, [values])

    def _bytes(self, count: int) -> Iterator[np.ndarray]:
        while count:
            piece = min(count, 64 << 20)
            yield np.frombuffer(self._random.bytes(piece), np.uint8)
            count -= piece


def add_decoder(
    weights: RandomWeights, facts: DecoderFacts, plan: Plan, kv_dtype: str, embedding: StoredTensor
) -> None:
    """Every weight of a decoder.

    Args:
      kv_dtype: int8 or float32; each layer's keys have an offset in an int8 cache.
      embedding: where the table of embeddings lies, which a tied head that is not quantised refers to.
    """
    from export.native import key_offset_name

    width, inner, dtype = facts.hidden_size, facts.intermediate_size, PRECISIONS[plan.weights]
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    for layer in range(facts.layers):
        name = f"layers.{layer}."
        weights.vector(name + "input_norm", width, around=1.0)
        weights.matrix(name + "qkv", width, queries + 2 * keys, dtype)
        weights.vector(name + "qkv.bias", queries + 2 * keys)
        weights.matrix(name + "attention_output", queries, width, dtype)
        weights.vector(name + "post_norm", width, around=1.0)
        weights.matrix(name + "gate_up", width, 2 * inner, dtype)
        weights.matrix(name + "down", inner, width, dtype)
        if kv_dtype == "int8":
            weights.key_offset(key_offset_name(layer), facts.num_kv_heads, facts.head_dim)
    weights.vector("final_norm", width, around=1.0)
    if plan.head in QUANTIZED:
        weights.matrix("head", width, facts.vocab_size, PRECISIONS[plan.head])
    elif facts.tied_embeddings:
        weights.stored["head.weight"] = embedding
    else:
        weights.table("head.weight", (facts.vocab_size, width), PRECISIONS[plan.head], width**-0.5)


def add_vision(weights: RandomWeights, facts: ModelFacts, plan: Plan) -> None:
    """Every weight of a vision tower."""
    tower, dtype = facts.vision, PRECISIONS[plan.vision]
    width, inner = tower.hidden_size, tower.intermediate_size
    if plan.vision in QUANTIZED:
        inner = padded_width(inner, plan.block)
    merged = width * facts.merge_size**2
    weights.matrix("patch_embed", facts.patch_values, width, "float32" if dtype == "float32" else "float16")
    for block in range(tower.depth):
        name = f"blocks.{block}."
        for norm in ("norm1", "norm2"):
            weights.vector(name + norm, width, around=1.0)
        for part, inputs, outputs in (
            ("qkv", width, 3 * width),
            ("attention_output", width, width),
            ("gate_up", width, 2 * inner),
            ("down", inner, width),
        ):
            weights.matrix(name + part, inputs, outputs, dtype)
            weights.vector(f"{name}{part}.bias", outputs)
    weights.vector("merger.norm", width, around=1.0)
    for part, outputs in (("hidden", merged), ("output", tower.out_hidden_size)):
        weights.matrix(f"merger.{part}", merged, outputs, dtype)
        weights.vector(f"merger.{part}.bias", outputs)

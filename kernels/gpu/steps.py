"""What whole steps of known models move and compute: one token, and one turn's rows, at a depth of the cache.

Owns the models' shapes and the counting. The vision tower, the embedding and sampling are left out: they are small
beside the rest, or depend on the frame. Knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .variant import Work

BLOCK = 32  # weights that share one float32 scale
LAUNCHES_A_LAYER = 11  # norm 2, products 4 and what prepares or finishes them 2, append, attend, merge


@dataclass(frozen=True)
class ModelShape:
    """A decoder: layers, widths and heads, as in its `config.json`."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Numbers in the products of one layer."""
        attention = self.hidden * (2 * self.query_heads + 2 * self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate


SHAPES = (
    ModelShape("Qwen2.5-VL 3B", 36, 2048, 11008, 16, 2, 128, 151_936),
    ModelShape("Qwen2.5-VL 7B", 28, 3584, 18944, 28, 4, 128, 152_064),
)


@dataclass(frozen=True)
class Step:
    """One pass of the decoder; its parts follow each other, so their times add up."""

    name: str
    parts: Sequence[Work]
    launches: int

    @property
    def bytes_moved(self) -> int:
        """By all parts."""
        return sum(part.bytes_moved for part in self.parts)


def step_of(shape: ModelShape, rows: int, depth: int) -> Step:
    """`rows` new tokens on top of `depth` cached ones: 4-bit weights, 8-bit head and cache, logits of the last row."""
    weights = shape.layers * shape.layer_weights
    products = Work(
        "products",
        "",
        bytes_moved=weights // 2 + weights // BLOCK * 4,
        fp16_tensor_ops=2 * rows * weights,
    )
    head_weights = shape.vocabulary * shape.hidden
    head = Work("head", "", head_weights + head_weights // BLOCK * 4, fp16_tensor_ops=2 * head_weights)
    rows_seen = depth + rows / 2  # a new token sees half of the other new ones
    multiplications = int(shape.layers * rows * shape.query_heads * shape.head_dim * rows_seen)
    cache_row = 2 * shape.kv_heads * (shape.head_dim + 4)
    attention = Work(
        "attention",
        "",
        bytes_moved=shape.layers * (depth + rows) * cache_row,
        int8_tensor_ops=2 * multiplications,
        fp16_tensor_ops=2 * multiplications,
    )
    what = "1 token" if rows == 1 else f"a turn of {rows}"
    return Step(
        f"{shape.name}, {what} at depth {depth:,}", (products, attention, head), LAUNCHES_A_LAYER * shape.layers
    )


def steps() -> list[Step]:
    """The steps that are predicted."""
    return [step_of(shape, rows, depth) for shape in SHAPES for rows in (1, 144) for depth in (4096, 16384)]

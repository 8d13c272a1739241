"""The vision graph: the patches of one frame in, one embedding per 2x2 block of patches out.

Owns the graph's layout and the names of its weights. The frame's geometry comes in as tables (rotary angles, window
mask), so one graph serves every frame size and needs no permutation of patches.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge import contract
from edge.contract import VisionFacts
from export.config import ModelFacts
from export.layers import gated_mlp, linear, rms_norm
from export.onnx_writer import GraphBuilder
from export.weight_store import StoredTensor

EPSILON = 1e-6
HIDDEN = "hidden"
"""Between slices of a tower that is checked a few blocks at a time: (P, hidden) float32."""


def build_vision(facts: ModelFacts, stored: Mapping[str, StoredTensor], blocks: range | None = None) -> GraphBuilder:
    """Build the vision tower, or only a run of its blocks that takes `hidden` from the run before and gives it on."""
    tower = facts.vision
    blocks = range(tower.depth) if blocks is None else blocks
    builder = GraphBuilder(stored)
    rows = ("P", tower.head_dim // 2)
    if blocks.start == 0:
        patches = builder.input(contract.PATCHES, "float32", ("P", facts.patch_values))
    else:
        hidden = builder.input(HIDDEN, "float32", ("P", tower.hidden_size))
    builder.input(contract.VISION_COS, "float32", rows)
    builder.input(contract.VISION_SIN, "float32", rows)
    builder.input(contract.WINDOW_MASK, "float32", ("P", "P"))
    if blocks.start == 0:
        builder.scope("patch_embed")
        hidden = linear(builder, patches, "patch_embed")
    cos = _per_head(builder, contract.VISION_COS)
    sin = _per_head(builder, contract.VISION_SIN)
    ends = blocks.stop == tower.depth
    for block in blocks:
        output = HIDDEN + ".updated" if not ends and block == blocks.stop - 1 else None
        hidden = _block(builder, tower, block, hidden, cos, sin, output)
    if ends:
        _merger(builder, facts, hidden)
    else:
        builder.output(hidden, "float32", ("P", tower.hidden_size))
    return builder


def _per_head(builder: GraphBuilder, table: str) -> str:
    builder.scope(table)
    return builder.op("Unsqueeze", table, builder.constant([1], "int64"))


def _block(
    builder: GraphBuilder, tower: VisionFacts, block: int, hidden: str, cos: str, sin: str, output: str | None
) -> str:
    prefix = f"blocks.{block}"
    builder.scope(f"{prefix}/attention")
    normed = rms_norm(builder, hidden, f"{prefix}.norm1", EPSILON)
    qkv = linear(builder, normed, f"{prefix}.qkv", bias=True)
    mask = None if block in tower.full_attention_blocks else contract.WINDOW_MASK
    attention = _attention(builder, tower, qkv, cos, sin, mask)
    hidden = builder.op("Add", hidden, linear(builder, attention, f"{prefix}.attention_output", bias=True))
    builder.scope(f"{prefix}/mlp")
    normed = rms_norm(builder, hidden, f"{prefix}.norm2", EPSILON)
    mlp = gated_mlp(builder, normed, prefix, tower.intermediate_size, bias=True)
    return builder.op("Add", hidden, mlp, output=output)


def _attention(builder: GraphBuilder, tower: VisionFacts, qkv: str, cos: str, sin: str, mask: str | None) -> str:
    """Attention among all patches, or inside windows where a mask is given. qkv (P, 3 hidden) -> (P, hidden)."""
    heads, width = tower.num_heads, tower.head_dim
    by_head = builder.op("Reshape", qkv, builder.constant([-1, 3 * heads, width], "int64"))
    split = builder.constant([2 * heads, heads], "int64")
    queries_keys, values = builder.node("Split", [by_head, split], outputs=2, axis=1)
    rotated = _rotate(builder, queries_keys, cos, sin, width // 2)
    split = builder.constant([heads, heads], "int64")
    queries, keys = builder.node("Split", [rotated, split], outputs=2, axis=1)
    queries = builder.op("Mul", queries, builder.constant(width**-0.5, "float32"))
    queries = builder.op("Transpose", queries, perm=[1, 0, 2])
    keys = builder.op("Transpose", keys, perm=[1, 2, 0])
    values = builder.op("Transpose", values, perm=[1, 0, 2])
    scores = builder.op("MatMul", queries, keys)
    if mask:
        scores = builder.op("Add", scores, mask)
    mixed = builder.op("MatMul", builder.op("Softmax", scores, axis=-1), values)
    mixed = builder.op("Transpose", mixed, perm=[1, 0, 2])
    return builder.op("Reshape", mixed, builder.constant([-1, heads * width], "int64"))


def _rotate(builder: GraphBuilder, values: str, cos: str, sin: str, half: int) -> str:
    """Rotate (P, heads, D); element i pairs with element i + D / 2."""
    widths = builder.constant([half, half], "int64")
    first, second = builder.node("Split", [values, widths], outputs=2, axis=2)
    turned_first = builder.op("Sub", builder.op("Mul", first, cos), builder.op("Mul", second, sin))
    turned_second = builder.op("Add", builder.op("Mul", second, cos), builder.op("Mul", first, sin))
    return builder.op("Concat", turned_first, turned_second, axis=2)


def _merger(builder: GraphBuilder, facts: ModelFacts, hidden: str) -> None:
    builder.scope("merger")
    normed = rms_norm(builder, hidden, "merger.norm", EPSILON)
    merged = facts.vision.hidden_size * facts.merge_size**2
    blocks = builder.op("Reshape", normed, builder.constant([-1, merged], "int64"))
    activated = builder.op("Gelu", linear(builder, blocks, "merger.hidden", bias=True), approximate="none")
    linear(builder, activated, "merger.output", bias=True, output=contract.IMAGE_EMBEDS)
    builder.output(contract.IMAGE_EMBEDS, "float32", ("N", facts.vision.out_hidden_size))

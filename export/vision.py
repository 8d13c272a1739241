"""The vision graph: the patches of one frame in, one embedding per 2x2 block of patches out.

Owns the graph's layout and the names of its weights. The frame's geometry comes in as tables (rotary angles, windows),
so one graph serves every frame size and needs no permutation of patches: the stock graph takes them as `patchify`
orders them, the native graph window by window, with the four patches of a block side by side in both.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge import contract
from export.config import ModelFacts
from export.onnx_writer import GraphBuilder
from export.stock import Operators, StockOperators
from export.weight_store import StoredTensor

EPSILON = 1e-6
HIDDEN = "hidden"
"""Between slices of a tower that is checked a few blocks at a time: (P, hidden) float32."""


def build_vision(
    facts: ModelFacts,
    stored: Mapping[str, StoredTensor],
    blocks: range | None = None,
    *,
    operators: Operators = StockOperators,
) -> GraphBuilder:
    """Build the vision tower, or only a run of its blocks that takes `hidden` from the run before and gives it on.

    Args:
      operators: what the layers are made of.
    """
    tower = facts.vision
    blocks = range(tower.depth) if blocks is None else blocks
    builder = GraphBuilder(stored)
    make = operators(builder)
    rows = ("P", tower.head_dim // 2)
    first = blocks.start == 0
    name, width = (contract.PATCHES, facts.patch_values) if first else (HIDDEN, tower.hidden_size)
    hidden = builder.input(name, "float32", ("P", width))
    builder.input(contract.VISION_COS, "float32", rows)
    builder.input(contract.VISION_SIN, "float32", rows)
    make.window_inputs()
    if first:
        builder.scope("patch_embed")
        hidden = make.linear(hidden, "patch_embed")
    hidden = make.start(hidden, tower.hidden_size)
    ends = blocks.stop == tower.depth
    for block in blocks:
        output = HIDDEN + ".updated" if not ends and block == blocks.stop - 1 else None
        hidden = _block(make, facts, block, hidden, output)
    if ends:
        _merger(make, facts, hidden)
    else:
        builder.output(hidden, "float32", ("P", tower.hidden_size))
    return builder


def _block(make: StockOperators, facts: ModelFacts, block: int, hidden: str, output: str | None) -> str:
    prefix = f"blocks.{block}"
    make.builder.scope(f"{prefix}/attention")
    normed = make.rms_norm(hidden, f"{prefix}.norm1", EPSILON)
    qkv = make.linear(normed, f"{prefix}.qkv", bias=True)
    attention = make.vision_attention(facts.vision, qkv, full=block in facts.vision.full_attention_blocks)
    hidden = make.linear(attention, f"{prefix}.attention_output", bias=True, residual=hidden)
    make.builder.scope(f"{prefix}/mlp")
    normed = make.rms_norm(hidden, f"{prefix}.norm2", EPSILON)
    return make.gated_mlp(normed, prefix, residual=hidden, bias=True, output=output)


def _merger(make: StockOperators, facts: ModelFacts, hidden: str) -> None:
    builder = make.builder
    builder.scope("merger")
    normed = make.rms_norm(hidden, "merger.norm", EPSILON)
    merged = facts.vision.hidden_size * facts.merge_size**2
    blocks = builder.op("Reshape", normed, builder.constant([-1, merged], "int64"))
    activated = builder.op("Gelu", make.linear(blocks, "merger.hidden", bias=True), approximate="none")
    make.linear(activated, "merger.output", bias=True, output=contract.IMAGE_EMBEDS)
    builder.output(contract.IMAGE_EMBEDS, "float32", ("N", facts.vision.out_hidden_size))

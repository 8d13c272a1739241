"""The names and shapes of a Qwen2.5-VL checkpoint's tensors, as transformers' current model class has them.

Owns also what older classes called them, and which tensors make up a layer's linear maps. Opens no file.
"""

from __future__ import annotations

import re

from edge.contract import DecoderFacts
from export.config import ModelFacts

VISUAL = "model.visual."
TEXT = "model.language_model."
HEAD = "lm_head.weight"
EMBEDDING = TEXT + "embed_tokens.weight"
COMPUTED = re.compile(r"rotary\w*\.inv_freq$")  # some files hold these tables; they follow from the config

Maps = dict[str, list[str]]
"""Linear maps of a layer by the last part of their weights' names, in the order in which a token meets them, and the
tensors that make up each."""
DECODER_MAPS: Maps = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention_output": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}
VISION_MAPS: Maps = {
    "qkv": ["attn.qkv"],
    "attention_output": ["attn.proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


def canonical_name(name: str) -> str:
    """The name that transformers' current model class gives a tensor that an older one wrote."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith((VISUAL, TEXT)):
        return TEXT + name.removeprefix("model.")
    if name.startswith("language_model.model."):
        return TEXT + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.") if name == "language_model.lm_head.weight" else name


def expected_shapes(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by name."""
    return {**_decoder_shapes(facts.decoder), **_vision_shapes(facts)}


def _decoder_shapes(text: DecoderFacts) -> dict[str, tuple[int, ...]]:
    width, kv = text.hidden_size, text.num_kv_heads * text.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (text.vocab_size, width), TEXT + "norm.weight": (width,)}
    if not text.tied_embeddings:
        shapes[HEAD] = (text.vocab_size, width)
    for layer in range(text.layers):
        prefix = f"{TEXT}layers.{layer}."
        for name, rows in (("q", width), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, width)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (text.intermediate_size, width)
        shapes[prefix + "mlp.down_proj.weight"] = (width, text.intermediate_size)
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
    return shapes


def _vision_shapes(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    tower, side = facts.vision, facts.patch_size
    hidden, merged = tower.hidden_size, tower.hidden_size * facts.merge_size**2
    patch = (hidden, 3, facts.temporal_patch_size, side, side)
    shapes: dict[str, tuple[int, ...]] = {VISUAL + "patch_embed.proj.weight": patch}
    for block in range(tower.depth):
        prefix = f"{VISUAL}blocks.{block}."
        linears = {
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "mlp.gate_proj": (tower.intermediate_size, hidden),
            "mlp.up_proj": (tower.intermediate_size, hidden),
            "mlp.down_proj": (hidden, tower.intermediate_size),
        }
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"], shapes[f"{prefix}{name}.bias"] = shape, (shape[0],)
        shapes[prefix + "norm1.weight"] = shapes[prefix + "norm2.weight"] = (hidden,)
    shapes[VISUAL + "merger.ln_q.weight"] = (hidden,)
    for name, shape in (("mlp.0", (merged, merged)), ("mlp.2", (tower.out_hidden_size, merged))):
        shapes[f"{VISUAL}merger.{name}.weight"], shapes[f"{VISUAL}merger.{name}.bias"] = shape, (shape[0],)
    return shapes

"""A checkpoint's `config.json` to the facts a graph is built from.

Owns the reading of every layout that transformers has written for Qwen2.5-VL, with its class defaults for keys left
out. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge.contract import DecoderFacts, VisionFacts
from edge.errors import CheckpointError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
MODEL_TYPE = "qwen2_5_vl"

TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
}
QWEN_MROPE_SECTION = (16, 24, 24)


@dataclass(frozen=True)
class ModelFacts:
    """Everything `config.json` decides."""

    decoder: DecoderFacts
    vision: VisionFacts
    patch_size: int
    merge_size: int
    temporal_patch_size: int

    @property
    def patch_values(self) -> int:
        """Numbers in one patch as the vision graph takes it."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def facts_from_config(config: Mapping[str, Any], *, has_head: bool = False) -> ModelFacts:
    """Read the model's shape.

    Args:
      config: content of `config.json`.
      has_head: whether the weights hold a head of their own. Decides only where a nested config leaves it open.

    Raises:
      CheckpointError: another architecture, or a feature that the graphs do not have; names key, expected and found.
    """
    _check_architecture(config)
    nested = config.get("text_config")
    text: dict[str, Any] = {**TEXT_DEFAULTS, **(nested if isinstance(nested, Mapping) else config)}
    vision: dict[str, Any] = {**VISION_DEFAULTS, **(config.get("vision_config") or {})}
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False) and not has_head)
    decoder = _decoder_facts(text, bool(tied))
    tower = _vision_facts(vision)
    _expect(tower.out_hidden_size == decoder.hidden_size, "vision_config.out_hidden_size",
            f"the decoder's hidden_size {decoder.hidden_size}", tower.out_hidden_size)  # fmt: skip
    return ModelFacts(
        decoder,
        tower,
        _integer(vision, "patch_size", "vision_config."),
        _integer(vision, "spatial_merge_size", "vision_config."),
        _integer(vision, "temporal_patch_size", "vision_config."),
    )


def _check_architecture(config: Mapping[str, Any]) -> None:
    found = config.get("model_type")
    architectures = config.get("architectures") or []
    if found != MODEL_TYPE or (architectures and ARCHITECTURE not in architectures):
        raise CheckpointError(
            f"`config.json` describes {', '.join(map(str, architectures)) or found!r} (model_type {found!r}), "
            f"expected {ARCHITECTURE} (model_type {MODEL_TYPE!r})",
            hint="Export a checkpoint of the Qwen2.5-VL architecture",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"The checkpoint is already quantised (method {method}), expected bfloat16, float16 or float32 weights",
            hint="Export the checkpoint it was made from, with `--weights int4`",
        )


def _decoder_facts(text: Mapping[str, Any], tied: bool) -> DecoderFacts:
    hidden, heads = _integer(text, "hidden_size"), _integer(text, "num_attention_heads")
    kv_heads = _integer({**text, "num_key_value_heads": text["num_key_value_heads"] or heads}, "num_key_value_heads")
    _expect(hidden % heads == 0, "hidden_size", f"a multiple of num_attention_heads {heads}", hidden)
    _expect(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads {kv_heads}", heads)
    head_dim = hidden // heads
    _expect(text.get("head_dim") in (None, head_dim), "head_dim", f"hidden_size / num_attention_heads = {head_dim}",
            text.get("head_dim"))  # fmt: skip
    _expect(text["hidden_act"] == "silu", "hidden_act", "'silu'", text["hidden_act"])
    layer_types = text.get("layer_types") or ["sliding_attention"]  # older files say it for all layers at once
    windowed = text.get("use_sliding_window") and "sliding_attention" in layer_types
    _expect(not windowed, "use_sliding_window", "false", True)
    theta, section = _rope(text, head_dim)
    return DecoderFacts(
        layers=_integer(text, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_integer(text, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(text, "vocab_size"),
        rms_norm_eps=float(text["rms_norm_eps"]),
        rope_theta=theta,
        mrope_section=section,
        tied_embeddings=tied,
    )


def _rope(text: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[int, ...]]:
    """RoPE base and m-RoPE sections; older files keep them apart, newer ones in `rope_parameters`."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _expect(kind in ("default", "mrope"), "rope_scaling.type", "'default' or 'mrope'", kind)
    default = QWEN_MROPE_SECTION if sum(QWEN_MROPE_SECTION) == head_dim // 2 else None
    section = scaling.get("mrope_section", default)
    valid = isinstance(section, (list, tuple)) and len(section) == 3 and sum(section) == head_dim // 2
    wanted = f"three numbers that add up to head_dim / 2 = {head_dim // 2}"
    _expect(valid, "rope_scaling.mrope_section", wanted, section)
    theta = float(scaling.get("rope_theta", text["rope_theta"]))
    return theta, tuple(int(n) for n in section or ())


def _vision_facts(vision: Mapping[str, Any]) -> VisionFacts:
    where = "vision_config."
    hidden, heads = _integer(vision, "hidden_size", where), _integer(vision, "num_heads", where)
    _expect(hidden % (heads * 4) == 0, "vision_config.hidden_size", f"a multiple of 4 * num_heads {heads}", hidden)
    _expect(vision["hidden_act"] == "silu", "vision_config.hidden_act", "'silu'", vision["hidden_act"])
    channels = vision.get("in_chans", vision["in_channels"])
    _expect(channels == 3, "vision_config.in_channels", "3", channels)
    return VisionFacts(
        depth=_integer(vision, "depth", where),
        hidden_size=hidden,
        intermediate_size=_integer(vision, "intermediate_size", where),
        num_heads=heads,
        out_hidden_size=_integer(vision, "out_hidden_size", where),
        window_size=_integer(vision, "window_size", where),
        full_attention_blocks=tuple(int(block) for block in vision["fullatt_block_indexes"]),
    )


def _integer(values: Mapping[str, Any], key: str, where: str = "") -> int:
    value = values[key]
    valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
    _expect(valid, where + key, "a whole number above 0", value)
    return int(value)


def _expect(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise CheckpointError(
            f"`config.json` key `{key}`: expected {expected}, found {found!r}",
            hint="Check that the folder is a Qwen2.5-VL checkpoint saved by transformers",
        )

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
LARGEST_FLOAT32 = 3.4e38
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 1024
"""Far above every model; a config that says more is damaged, and would be walked for hours."""


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
        """Numbers in one patch as the vision graph takes it: of one frame, which fills every temporal slice."""
        return 3 * self.patch_size**2


def facts_from_config(config: Mapping[str, Any], *, has_head: bool = False) -> ModelFacts:
    """Read the model's shape.

    Args:
      config: content of `config.json`.
      has_head: whether the weights hold a head of their own. Decides only where a nested config leaves it open.

    Raises:
      CheckpointError: another architecture, or a feature that the graphs do not have; names key, expected and found.
    """
    _check_architecture(config)
    nested = _object(config, "text_config")
    text: dict[str, Any] = {**TEXT_DEFAULTS, **(config if nested is None else nested)}
    vision: dict[str, Any] = {**VISION_DEFAULTS, **(_object(config, "vision_config") or {})}
    at_top = _flag(config, "tie_word_embeddings") and not has_head
    tied = _flag(text, "tie_word_embeddings") if "tie_word_embeddings" in text else at_top
    decoder = _decoder_facts(text, tied)
    tower = _vision_facts(vision)
    _expect(tower.out_hidden_size == decoder.hidden_size, "vision_config.out_hidden_size",
            f"the decoder's hidden_size {decoder.hidden_size}", tower.out_hidden_size)  # fmt: skip
    keys = ("patch_size", "spatial_merge_size", "temporal_patch_size")
    patch, merge, temporal = (_integer(vision, key, "vision_config.") for key in keys)
    _expect(tower.window_size >= patch * merge, "vision_config.window_size",
            f"at least patch_size * spatial_merge_size = {patch * merge}", tower.window_size)  # fmt: skip
    return ModelFacts(decoder, tower, patch, merge, temporal)


def _check_architecture(config: Mapping[str, Any]) -> None:
    found = config.get("model_type")
    architectures = _list(config, "architectures")
    if found != MODEL_TYPE or (architectures and ARCHITECTURE not in architectures):
        raise CheckpointError(
            f"`config.json` describes {', '.join(map(str, architectures)) or found!r} (model_type {found!r}), "
            f"expected {ARCHITECTURE} (model_type {MODEL_TYPE!r})",
            hint="Export a checkpoint of the Qwen2.5-VL architecture",
        )
    quantization = _object(config, "quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
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
    layer_types = _list(text, "layer_types") or ["sliding_attention"]  # older files say it for all layers at once
    windowed = text.get("use_sliding_window") and "sliding_attention" in layer_types
    _expect(not windowed, "use_sliding_window", "false", True)
    theta, section = _rope(text, head_dim)
    return DecoderFacts(
        layers=_integer(text, "num_hidden_layers", at_most=MOST_LAYERS),
        hidden_size=hidden,
        intermediate_size=_integer(text, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(text, "vocab_size"),
        rms_norm_eps=_number(text, "rms_norm_eps"),
        rope_theta=theta,
        mrope_section=section,
        tied_embeddings=tied,
    )


def _rope(text: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[int, ...]]:
    """RoPE base and m-RoPE sections; older files keep them apart, newer ones in `rope_parameters`."""
    scaling = _object(text, "rope_parameters") or _object(text, "rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    _expect(kind in ("default", "mrope"), "rope_scaling.type", "'default' or 'mrope'", kind)
    default = QWEN_MROPE_SECTION if sum(QWEN_MROPE_SECTION) == head_dim // 2 else None
    section = scaling.get("mrope_section", default)
    whole = isinstance(section, (list, tuple)) and all(_is_whole(part) and part >= 0 for part in section)
    valid = whole and len(section) == 3 and sum(section) == head_dim // 2
    wanted = f"three whole numbers that add up to head_dim / 2 = {head_dim // 2}"
    _expect(valid, "rope_scaling.mrope_section", wanted, section)
    theta = _number(scaling, "rope_theta", "rope_scaling.") if "rope_theta" in scaling else _number(text, "rope_theta")
    return theta, tuple(section)


def _vision_facts(vision: Mapping[str, Any]) -> VisionFacts:
    where = "vision_config."
    hidden, heads = _integer(vision, "hidden_size", where), _integer(vision, "num_heads", where)
    _expect(hidden % (heads * 4) == 0, "vision_config.hidden_size", f"a multiple of 4 * num_heads {heads}", hidden)
    _expect(vision["hidden_act"] == "silu", "vision_config.hidden_act", "'silu'", vision["hidden_act"])
    channels = vision.get("in_chans", vision["in_channels"])
    _expect(channels == 3, "vision_config.in_channels", "3", channels)
    blocks = _list(vision, "fullatt_block_indexes", where)
    _expect(all(_is_whole(block) and block >= 0 for block in blocks), where + "fullatt_block_indexes",
            "whole numbers of 0 or more", blocks)  # fmt: skip
    return VisionFacts(
        depth=_integer(vision, "depth", where, at_most=MOST_LAYERS),
        hidden_size=hidden,
        intermediate_size=_integer(vision, "intermediate_size", where),
        num_heads=heads,
        out_hidden_size=_integer(vision, "out_hidden_size", where),
        window_size=_integer(vision, "window_size", where),
        full_attention_blocks=tuple(blocks),
    )


def _integer(values: Mapping[str, Any], key: str, where: str = "", *, at_most: int = LARGEST_SIZE) -> int:
    value = values[key]
    _expect(_is_whole(value) and value > 0, where + key, "a whole number above 0", value)
    _expect(value <= at_most, where + key, f"at most {at_most}", value)
    return int(value)


def _number(values: Mapping[str, Any], key: str, where: str = "") -> float:
    value = values[key]
    _expect(is_number(value) and value > 0, where + key, "a number above 0", value)
    return float(value)


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = values.get(key)
    _expect(value is None or isinstance(value, Mapping), key, "an object", value)
    return value


def _list(values: Mapping[str, Any], key: str, where: str = "") -> list[Any]:
    value = values.get(key)
    _expect(value is None or isinstance(value, (list, tuple)), where + key, "a list", value)
    return list(value or [])


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    _expect(value is None or isinstance(value, bool), key, "true or false", value)
    return bool(value)


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_FLOAT32


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise CheckpointError(
            f"`config.json` key `{key}`: expected {expected}, found {found!r}",
            hint="Check that the folder is a Qwen2.5-VL checkpoint saved by transformers",
        )

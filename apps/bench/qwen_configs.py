"""The numbers of the public Qwen2.5-VL checkpoints, as their `config.json` files give them.

Owns the table. Sources: `config.json` of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct on Hugging Face. The 3B file leaves
most of the vision tower to the defaults of transformers' class, the other three write it out; the flat layout is that
of the files as published.
"""

from __future__ import annotations

from typing import Any

SIZES = ("3B", "7B", "32B", "72B")

_TEXT: dict[str, dict[str, Any]] = {
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
_VISION_WIDTH_INSIDE = {"3B": 3420, "7B": 3420, "32B": 3456, "72B": 3456}


def public_config(size: str) -> dict[str, Any]:
    """Content of the `config.json` of one of `SIZES`, without the keys that decide nothing here."""
    text = _TEXT[size]
    vision: dict[str, Any] = {
        "hidden_size": 1280,
        "in_chans": 3,
        "out_hidden_size": text["hidden_size"],
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
    }
    if size != "3B":
        vision |= {
            "depth": 32,
            "hidden_act": "silu",
            "intermediate_size": _VISION_WIDTH_INSIDE[size],
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "temporal_patch_size": 2,
        }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        **text,
        "vision_config": vision,
    }

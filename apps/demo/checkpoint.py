"""The demonstration model's Hugging Face folder: configuration, tensor names, reading and writing.

Owns every file of the checkpoint except the tokenizer's. Needs torch and transformers.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from apps.demo import CHECKPOINT
from apps.demo.vocabulary import build_tokenizer, save_tokenizer, write_json
from apps.demo.world import MAX_DURATION_S

MAX_PIXELS = 11760  # 140 x 84: five by three visual tokens for the demonstration's 5:3 frames
MIN_PIXELS = 3136
VOCABULARY_ROWS = 832

VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 384,
    "out_hidden_size": 256,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
    "in_channels": 3,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY_ROWS,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
}


def config_content(tokenizer) -> dict:
    """`config.json` in the flat layout of Qwen's published folders, with the token ids of `tokenizer`.

    Raises:
      ValueError: the tokenizer has more tokens than the embedding has rows.
    """
    if tokenizer.get_vocab_size() > VOCABULARY_ROWS:
        raise ValueError(f"the embedding has {VOCABULARY_ROWS} rows, the tokenizer {tokenizer.get_vocab_size()} tokens")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        **TEXT,
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "qwen2_5_vl", "hidden_act": "silu", **VISION},
    }


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised fp32 model."""
    torch.manual_seed(seed)
    content = config_content(build_tokenizer())
    content.pop("torch_dtype")
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**content))
    return model.float()


def hub_name(name: str) -> str:
    """The name that Qwen's published files give one of transformers' in-memory parameters."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def hub_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `state_dict` under its published names, without the tied head."""
    return {hub_name(name): tensor for name, tensor in state.items() if name != "lm_head.weight"}


def save_checkpoint(state: dict[str, torch.Tensor], folder: Path = CHECKPOINT) -> None:
    """Write the whole folder in bf16, in place of what was there, in one rename.

    Args:
      state: transformers' `state_dict` of the model, any dtype.
      folder: where the checkpoint goes.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, fresh)
    config = config_content(tokenizer)
    write_json(fresh / "config.json", config)
    write_json(fresh / "streamo.json", {"window_turns": MAX_DURATION_S})
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in hub_tensors(state).items()}
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS).save_pretrained(fresh)
    write_json(
        fresh / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "do_sample": False,
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": config["pad_token_id"],
            "repetition_penalty": 1.0,
        },
    )
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)

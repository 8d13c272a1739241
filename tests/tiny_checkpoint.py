"""Small Qwen2.5-VL checkpoints with random weights, saved by transformers itself, for tests.

Also a tokenizer with Qwen's special tokens and the three state tokens, over a byte-level alphabet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "</Silence>",
    "</Standby>",
    "</Response>",
)
BYTES = 256
VOCABULARY = 320  # a little more than the tokenizer needs, as in real checkpoints


def token_id(text: str) -> int:
    """Id of a special token."""
    return BYTES + SPECIAL_TOKENS.index(text)


def tiny_config(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    intermediate_size: int = 96,
    tied: bool = True,
    vision_depth: int = 3,
    vision_hidden: int = 64,
    vision_intermediate: int = 84,
    vision_heads: int = 2,
    full_attention_blocks: tuple[int, ...] = (1,),
    vocabulary: int = VOCABULARY,
) -> Any:
    """A Qwen2_5_VLConfig of the given shape."""
    from transformers import Qwen2_5_VLConfig

    half = head_dim // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": heads * head_dim,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32768,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": vision_heads,
            "out_hidden_size": heads * head_dim,
            "fullatt_block_indexes": list(full_attention_blocks),
            "tokens_per_second": 2,
        },
        tie_word_embeddings=tied,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def write_checkpoint(
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "1GB",
    key_bias_norm: float = 0,
    **shape: Any,
) -> Any:
    """Write a whole checkpoint folder; returns the model as transformers loads it again, in float32.

    Args:
      dtype: of the saved weights: float32, float16 or bfloat16.
      max_shard_size: small values make several shards with an index.
      key_bias_norm: of 8 channels in the key bias of the first and the last layer, as in Qwen2.5; 0: none stands out.
      shape: see `tiny_config`.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(**shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
        if key_bias_norm:
            layers = model.model.language_model.layers
            for layer in (layers[0], layers[-1]):
                bias = layer.self_attn.k_proj.bias
                values = torch.randn(8)
                bias[torch.randperm(len(bias))[:8]] = values / values.norm() * key_bias_norm
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    write_preprocessor(folder)
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()


def write_large_checkpoint(folder: Path, config: Any, *, seed: int = 0) -> int:
    """Write a bfloat16 checkpoint of any size without holding it: one tensor's piece in memory at a time.

    Args:
      config: as `tiny_config` gives it.

    Returns:
      Bytes of its largest tensor.
    """
    import math

    import numpy as np

    from export.config import facts_from_config
    from export.tensor_names import expected_shapes

    folder.mkdir(parents=True)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    shapes = expected_shapes(facts_from_config(json.loads((folder / "config.json").read_text())))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left, width = math.prod(shape), math.prod(shape[1:])
            mean, spread = (1.0, 0.1) if "norm" in name or "ln_q" in name else (0.0, width**-0.5 if shape[1:] else 0.1)
            while left:
                count = min(left, 1 << 22)
                values = mean + spread * rng.standard_normal(count, np.float32)
                (values.view(np.uint32) >> 16).astype("<u2").tofile(file)
                left -= count
    write_tokenizer(folder)
    write_preprocessor(folder)
    return 2 * max(math.prod(shape) for shape in shapes.values())


def write_tokenizer(folder: Path, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> None:
    """A byte-level BPE tokenizer without merges: ids 0..255 are bytes, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_preprocessor(folder: Path, **changes: Any) -> None:
    """The image processor's config, with Streamo's pixel limits."""
    values: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 100352,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **changes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))

"""The public Qwen2.5-VL shapes, 3B to 72B: read from their configs, found in shards, exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.bench import random_checkpoint
from apps.bench.qwen_configs import SIZES, public_config
from export.checkpoint import open_checkpoint
from export.config import facts_from_config
from export.tensor_names import EMBEDDING, HEAD, TEXT, VISUAL, canonical_name, expected_shapes

# Parameters as the Hugging Face pages of Qwen2.5-VL-{3B,7B,32B,72B}-Instruct give them, in billions.
PARAMETERS = {"3B": 3.75, "7B": 8.29, "32B": 33.5, "72B": 73.4}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """The layout that newer transformers write."""
    top = {"architectures", "model_type", "image_token_id", "video_token_id", "torch_dtype", "vision_config"}
    text = {key: value for key, value in config.items() if key not in top}
    outer = {key: value for key, value in config.items() if key in top or key == "tie_word_embeddings"}
    return {**outer, "text_config": {**text, "model_type": "qwen2_5_vl_text"}}


@pytest.mark.parametrize("layout", [dict, nested])
@pytest.mark.parametrize("size", SIZES)
def test_the_shapes_of_a_public_config_are_those_of_transformers_model(size: str, layout: Any) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = layout(public_config(size))
    facts = facts_from_config(config)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # a tied head is not among them
    assert expected_shapes(facts) == {canonical_name(name): shape for name, shape in theirs.items()}
    assert facts.decoder.tied_embeddings is (size == "3B")
    total = sum(math.prod(shape) for shape in theirs.values())
    assert total / 1e9 == pytest.approx(PARAMETERS[size], rel=0.005)


def test_the_facts_of_the_largest_model() -> None:
    facts = facts_from_config(public_config("72B"))
    text, tower = facts.decoder, facts.vision
    assert (text.layers, text.num_heads, text.num_kv_heads, text.head_dim) == (80, 64, 8, 128)
    assert (tower.depth, tower.intermediate_size, tower.out_hidden_size) == (32, 3456, 8192)
    assert text.mrope_section == (16, 24, 24) and not text.tied_embeddings


@pytest.mark.parametrize("names", ["published", "newer"])
@pytest.mark.parametrize("size", ["3B", "7B"])
def test_shards_of_a_small_copy_of_a_public_shape_are_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, names: str
) -> None:
    """Every ratio of the public shape that decides names or layout, at a width that fits a test."""
    config = small(public_config(size))
    monkeypatch.setattr(random_checkpoint, "public_config", lambda size: config)
    monkeypatch.setattr(random_checkpoint, "BLOCK_VALUES", 100_003)
    if names == "newer":
        monkeypatch.setattr(random_checkpoint, "_published_name", lambda name: name)
    total = random_checkpoint.write_checkpoint(tmp_path / "checkpoint", size, shard_bytes=300_000)
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 3
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.head_name == (HEAD if size == "7B" else EMBEDDING)
    assert (HEAD in checkpoint.entries) is (size == "7B")
    assert 2 * checkpoint.parameters == total and checkpoint.dtype == "bfloat16"
    for name in (TEXT + "layers.1.self_attn.k_proj.weight", VISUAL + "merger.mlp.2.bias", EMBEDDING):
        assert np.isfinite(checkpoint.read(name)).all()


def small(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"] // config["num_key_value_heads"]
    vision = config["vision_config"] | {"hidden_size": 64, "out_hidden_size": 16 * heads, "num_heads": 2, "depth": 2,
                                        "intermediate_size": 84, "fullatt_block_indexes": [1]}  # fmt: skip
    return config | {
        "hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": 1, "intermediate_size": 96,
        "num_hidden_layers": 2, "vocab_size": 1024, "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip

"""A LoRA adapter beside its base model: merged as PEFT merges it, tensor by tensor, or refused with a reason."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import SPECIAL_TOKENS, VOCABULARY, write_checkpoint, write_tokenizer

from edge.errors import CheckpointError
from export.adapter import open_adapter
from export.api import export_checkpoint
from export.checkpoint import Checkpoint, open_checkpoint
from export.merge import with_adapter
from export.tensor_names import EMBEDDING, HEAD, TEXT, VISUAL, canonical_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WIDTH, RANK = 64, 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied") / "tiny-base"
    write_checkpoint(folder, tied=False)
    return folder


def merged(base: Path, adapter: Path) -> Checkpoint:
    return with_adapter(open_checkpoint(base), open_adapter(adapter))[0]


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """An adapter folder; keys of `tensors` go without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": "tiny-base", **config}
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file({f"base_model.model.{name}": values for name, values in tensors.items()}, folder / WEIGHTS)
    return folder


def factors(module: str, rows: int, columns: int, seed: int = 0, rank: int = RANK) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": random.standard_normal((rank, columns)).astype(np.float32),
        f"{module}.lora_B.weight": random.standard_normal((rows, rank)).astype(np.float32),
    }


def product(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    double = {name: values.astype(np.float64) for name, values in tensors.items()}
    return double[f"{module}.lora_B.weight"] @ double[f"{module}.lora_A.weight"]


# Against PEFT itself ----------------------------------------------------------------------------------------------


def peft_adapter(base: Path, folder: Path, **options: Any) -> dict[str, np.ndarray]:
    """Save a random adapter with PEFT; returns the state of the model that PEFT merges it into."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=10, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder))
    state = wrapped.merge_and_unload().state_dict()
    return {canonical_name(name): tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": LINEAR},
        {"target_modules": LINEAR, "use_rslora": True},
        {"target_modules": LINEAR, "use_dora": True},
        {"target_modules": [*LINEAR, "qkv", "proj"]},  # the tower, with its patch embedding
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["linear", "rslora", "dora", "tower", "patterns", "bias", "embedding", "head", "saved modules"],
)
def test_the_merged_tensors_are_those_of_peft(untied: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = peft_adapter(untied, tmp_path / "adapter", **options)
    found, before = merged(untied, tmp_path / "adapter"), open_checkpoint(untied)
    assert found.entries.keys() == expected.keys()
    changed = 0
    for name, values in expected.items():
        np.testing.assert_allclose(found.read(name), values, rtol=1e-5, atol=2e-6, err_msg=name)
        changed += not np.array_equal(values, before.read(name))
    assert changed >= len(found.updates) > 0


def test_peft_computes_what_the_merged_checkpoint_computes_where_the_head_was_tied(base: Path, tmp_path: Path) -> None:
    """Trained beside a tied head, saved copies of embedding and head are two tensors."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    checkpoint, notes = with_adapter(open_checkpoint(base), open_adapter(tmp_path / "adapter"))
    assert not checkpoint.facts.decoder.tied_embeddings and "no longer tied" in notes[0]
    embedding, head = wrapped.get_input_embeddings(), wrapped.get_output_embeddings()
    np.testing.assert_array_equal(checkpoint.token_rows(0, VOCABULARY), embedding(torch.arange(VOCABULARY)).detach())
    hidden = torch.eye(WIDTH)
    np.testing.assert_allclose(np.concatenate(list(checkpoint.head_rows(100))).T, head(hidden).detach(), atol=1e-6)


# Against numpy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "tensor"),
    [
        ("model.layers.1.self_attn.q_proj", TEXT + "layers.1.self_attn.q_proj.weight"),
        ("model.language_model.layers.1.self_attn.q_proj", TEXT + "layers.1.self_attn.q_proj.weight"),
        ("language_model.model.layers.1.self_attn.q_proj", TEXT + "layers.1.self_attn.q_proj.weight"),
        ("visual.blocks.2.attn.proj", VISUAL + "blocks.2.attn.proj.weight"),
        ("model.visual.blocks.2.attn.proj", VISUAL + "blocks.2.attn.proj.weight"),
    ],
)
@pytest.mark.parametrize("ending", [".weight", ".default.weight"])
def test_every_spelling_of_a_tensors_name_is_one_tensor(
    base: Path, tmp_path: Path, written: str, tensor: str, ending: str
) -> None:
    tensors = factors(written, WIDTH, WIDTH)
    spelled = {name.replace(".weight", ending): values for name, values in tensors.items()}
    found = merged(base, write_adapter(tmp_path / "adapter", spelled)).read(tensor)
    expected = open_checkpoint(base).read(tensor) + 8 / RANK * product(tensors, written)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tensor_read_in_pieces_has_the_bytes_of_the_tensor_read_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", vocabulary=1100, dtype="bfloat16", tied=False)
    tensors = factors("lm_head", 1100, WIDTH) | factors("model.layers.0.mlp.down_proj", WIDTH, 96)
    checkpoint = merged(tmp_path / "base", write_adapter(tmp_path / "adapter", tensors))
    whole = checkpoint.read(HEAD)
    for rows in (1, 7, 256, 300, 4000):
        pieces = checkpoint.head_rows(rows)
        np.testing.assert_array_equal(np.concatenate(list(pieces)), whole)
    name = TEXT + "layers.0.mlp.down_proj.weight"
    columns = checkpoint.columns(name)
    rows = np.zeros((96, WIDTH), np.float32)
    for first in range(0, 96, 13):
        columns.read_into(rows[first : first + 13], first)
    np.testing.assert_array_equal(rows.T, checkpoint.read(name))


def test_a_tower_that_was_trained_in_full_beside_the_adapter_is_taken(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH))
    bias = np.full(WIDTH, 0.25, np.float32)
    save_file({"base_model.model.model.visual.blocks.0.attn.proj.bias": bias}, adapter / "vit.safetensors")
    np.testing.assert_array_equal(merged(base, adapter).read(VISUAL + "blocks.0.attn.proj.bias"), bias)


def test_training_settings_that_do_not_change_the_merge_are_ignored(base: Path, tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    plain = merged(base, write_adapter(tmp_path / "plain", tensors))
    settings = {
        "lora_dropout": 0.1,
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
        "use_qalora": False,
    }
    others = merged(base, write_adapter(tmp_path / "others", tensors, **settings, target_modules="^model.*q_proj$"))
    name = TEXT + "layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(plain.read(name), others.read(name))


# Whole exports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_bundle_of_base_and_adapter_has_the_bytes_of_the_merged_checkpoints(
    base: Path, tmp_path: Path, weights: str
) -> None:
    tensors = factors("model.layers.1.mlp.down_proj", WIDTH, 96) | factors("visual.blocks.0.mlp.up_proj", 84, WIDTH, 1)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    checkpoint = merged(base, adapter)
    by_hand = Path(shutil.copytree(base, tmp_path / "by-hand"))
    stored = load_file(by_hand / "model.safetensors")
    save_file({name: checkpoint.read(canonical_name(name)) for name in stored}, by_hand / "model.safetensors")
    found = export_checkpoint(base, tmp_path / "one", weights=weights, adapter=adapter)
    expected = export_checkpoint(by_hand, tmp_path / "two", weights=weights)
    assert found.files == expected.files and found.parity["passed"]
    source = found.source["adapter"]
    assert source["name"] == "adapter" and source["base"] == "tiny-base" and source["tensors"] == 2
    assert source["config_sha256"] == hashlib.sha256((adapter / CONFIG).read_bytes()).hexdigest()


def test_an_adapter_that_unties_the_head_is_exported_with_a_head_of_its_own(base: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"lm_head.weight": rows})
    manifest = export_checkpoint(base, tmp_path / "bundle", adapter=adapter)
    assert manifest.parity["passed"] and not manifest.decoder_facts.tied_embeddings
    embedding = np.fromfile(tmp_path / "bundle" / manifest.embedding.file, np.float32).reshape(VOCABULARY, WIDTH)
    np.testing.assert_array_equal(embedding, open_checkpoint(base).read(EMBEDDING))


def test_state_tokens_that_training_added_are_taken_from_the_adapters_folder(base: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(base, tmp_path / "tiny-base"))
    write_tokenizer(plain, SPECIAL_TOKENS[:8])
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH))
    with pytest.raises(CheckpointError, match="lacks the state token"):
        export_checkpoint(plain, tmp_path / "bundle", adapter=adapter)
    states = list(SPECIAL_TOKENS[8:])
    (adapter / "args.json").write_text(json.dumps({"new_special_tokens": states, "lora_rank": RANK}))
    from_names = export_checkpoint(plain, tmp_path / "one", adapter=adapter)
    shutil.copy(base / "tokenizer.json", adapter / "tokenizer.json")
    from_file = export_checkpoint(plain, tmp_path / "two", adapter=adapter)
    assert from_names.tokens == from_file.tokens
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(plain / "tokenizer.json"))
    theirs.add_special_tokens({"additional_special_tokens": states})
    ours = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "one" / "tokenizer.json"))
    text = "a</Silence>b</Standby></Response>c"
    assert ours(text).input_ids == theirs(text).input_ids


# What is refused --------------------------------------------------------------------------------------------------


def refusal(base: Path, adapter: Path) -> CheckpointError:
    """The error of a whole export, which leaves nothing behind."""
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(base, adapter.parent / "bundle", adapter=adapter)
    assert not any("bundle" in path.name for path in adapter.parent.iterdir())
    return caught.value


def test_an_adapter_given_as_the_checkpoint_is_told_how_to_give_it(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH))
    with pytest.raises(CheckpointError, match="holds a LoRA adapter") as caught:
        export_checkpoint(adapter, tmp_path / "bundle")
    assert f"--adapter {adapter}" in str(caught.value.hint) and "tiny-base" in str(caught.value.hint)


def test_a_folder_without_an_adapter_is_named(base: Path, tmp_path: Path) -> None:
    assert f"no readable `{CONFIG}`" in refusal(base, tmp_path / "nothing").message
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH))
    (adapter / WEIGHTS).unlink()
    assert f"has no `{WEIGHTS}`" in refusal(base, adapter).message


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(base: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    (adapter / WEIGHTS).rename(adapter / "kept")
    pickled = {f"base_model.model.{name}": torch.from_numpy(values) for name, values in tensors.items()}
    torch.save(pickled, adapter / "adapter_model.bin")
    error = refusal(base, adapter)
    assert "is a pickle" in error.message
    run_hint(str(error.hint))
    assert load_file(adapter / WEIGHTS).keys() == load_file(adapter / "kept").keys()
    merged(base, adapter)


def run_hint(hint: str) -> None:
    """Run a command of a hint as a user would, with the interpreter of the tests."""
    import subprocess
    import sys

    done = subprocess.run(
        hint.replace("python -c", f"{sys.executable} -c"), shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_pickled_checkpoint_is_refused_with_the_command_that_converts_it(base: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pickled = Path(shutil.copytree(base, tmp_path / "pickled"))
    tensors = {name: torch.from_numpy(values) for name, values in load_file(pickled / "model.safetensors").items()}
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        export_checkpoint(pickled, tmp_path / "bundle")
    command, _, _ = str(caught.value.hint).partition(", then copy")
    run_hint(command)
    found, expected = open_checkpoint(tmp_path / "pickled-safetensors"), open_checkpoint(base)
    for name in expected.entries:
        np.testing.assert_array_equal(found.read(name), expected.read(name))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "IA3"}, "expected 'LORA', found 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices`"),
        ({"something_new": {"a": 1}}, "`something_new`"),
        ({"r": 0}, "`r`: expected a whole number above 0, found 0"),
        ({"lora_alpha": "16"}, "`lora_alpha`: expected a number above 0"),
        ({"r": 2}, "expected a rank of 2"),
        ({"use_dora": True}, "no `lora_magnitude_vector`"),
        ({"rank_pattern": {"(": 2}}, "has the pattern '('"),
        ({"rank_pattern": [1]}, "`rank_pattern`: expected an object"),
    ],
)
def test_options_that_are_not_merged_and_odd_values_are_refused_by_name(
    base: Path, tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    assert expected in refusal(base, write_adapter(tmp_path / "adapter", tensors, **config)).message


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (factors("model.layers.0.self_attn.q_proj", 128, 128), "do not fit"),
        (factors("model.layers.7.self_attn.q_proj", WIDTH, WIDTH), "changes 1 tensors that this checkpoint does not"),
        (factors("model.layers.0.mlp.fc1", WIDTH, WIDTH), "mlp.fc1.weight"),
        ({"model.embed_tokens.weight": np.zeros((VOCABULARY + 8, WIDTH), np.float32)}, "do not fit"),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.zeros((3, WIDTH), np.float32)},
            "token_adapter",
        ),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((RANK, WIDTH), np.float32)}, "has no `lora_B`"),
    ],
)
def test_an_adapter_for_another_base_is_refused_by_tensor(
    base: Path, tmp_path: Path, tensors: dict[str, np.ndarray], expected: str
) -> None:
    assert expected in refusal(base, write_adapter(tmp_path / "adapter", tensors)).message


def test_a_base_of_another_name_is_noted(base: Path, tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    for name, noted in (("hub/Tiny_Base/", False), ("hub/Other-7B", True)):
        adapter = write_adapter(tmp_path / "adapter", tensors, base_model_name_or_path=name)
        _, notes = with_adapter(open_checkpoint(base), open_adapter(adapter))
        assert any("trained on" in note for note in notes) is noted


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_factor_that_holds_no_numbers_is_refused_by_tensor(
    base: Path, tmp_path: Path, part: str, value: float
) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    tensors[f"model.layers.0.self_attn.q_proj.{part}.weight"][1, 2] = value
    message = refusal(base, write_adapter(tmp_path / "adapter", tensors)).message
    assert f"q_proj.{part}.weight` holds 1 values" in message


def test_a_sum_beyond_float32_is_refused_by_tensor(base: Path, tmp_path: Path) -> None:
    tensors = {name: values * 1e20 for name, values in factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH).items()}
    message = refusal(base, write_adapter(tmp_path / "adapter", tensors)).message
    assert "q_proj.weight` with the adapter added holds" in message


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [cut, lambda content: b"", lambda content: b"\0" * 100])
def test_a_damaged_adapter_file_is_one_clear_error(
    base: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH))
    (adapter / WEIGHTS).write_bytes(damage((adapter / WEIGHTS).read_bytes()))
    assert "is not a whole safetensors file" in refusal(base, adapter).message
    (adapter / CONFIG).write_bytes(damage((adapter / CONFIG).read_bytes()))
    assert "is not JSON" in refusal(base, adapter).message

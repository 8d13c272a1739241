"""Which checkpoint folders export opens, and what it says about those that it cannot."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import SPECIAL_TOKENS, tiny_config, token_id, write_checkpoint, write_preprocessor, write_tokenizer

from edge.contract import TokenIds
from edge.errors import CheckpointError
from edge.preprocess import PreprocessConfig
from edge.prompt import STREAMO
from export import safetensors_file
from export.api import export_checkpoint
from export.checkpoint import open_checkpoint
from export.config import facts_from_config
from export.probe import build_probe
from export.stream_config import read_preprocess, read_stream_file
from export.tensor_names import EMBEDDING, HEAD, canonical_name
from export.tokens import token_ids

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    document = json.loads((folder / name).read_text())
    document.update(changes)
    (folder / name).write_text(json.dumps(document))


def refusal(folder: Path) -> str:
    """The message of a whole export, which leaves nothing behind."""
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(folder, folder.parent / "bundle")
    assert sorted(path.name for path in folder.parent.iterdir() if "bundle" in path.name) == []
    assert caught.value.exit_code == 3
    return caught.value.message


def test_old_and_new_tensor_names_are_one_checkpoint(folder: Path) -> None:
    expected = open_checkpoint(folder)
    embedding = expected.read(EMBEDDING)
    tensors = load_file(folder / WEIGHTS)
    for style in ("old", "new"):
        renamed = {}
        for name, values in tensors.items():
            new = canonical_name(name)
            old = new.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            renamed[new if style == "new" else old] = values
        save_file(renamed, folder / WEIGHTS)
        found = open_checkpoint(folder)
        assert sorted(found.entries) == sorted(expected.entries)
        np.testing.assert_array_equal(found.read(EMBEDDING), embedding)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_read_exactly_from_one_file_and_from_shards(tmp_path: Path, dtype: str) -> None:
    model = write_checkpoint(tmp_path / "one", dtype=dtype, tied=False)
    write_checkpoint(tmp_path / "many", dtype=dtype, tied=False, max_shard_size="300KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.dtype == many.dtype == dtype
    expected = {canonical_name(name): tensor.numpy() for name, tensor in model.state_dict().items()}
    assert one.entries.keys() == many.entries.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(one.read(name), values)
        np.testing.assert_array_equal(many.read(name), values)
    np.testing.assert_array_equal(np.concatenate(list(many.rows(HEAD, 7))), expected[HEAD])


def test_keys_left_out_of_the_config_have_the_values_of_transformers_classes() -> None:
    from transformers import Qwen2_5_VLConfig

    defaults = Qwen2_5_VLConfig(vision_config={"out_hidden_size": 8192})
    config = {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}}
    facts = facts_from_config(config)
    text, vision = defaults.text_config, defaults.vision_config
    assert facts.decoder.layers == text.num_hidden_layers
    assert facts.decoder.num_kv_heads == text.num_key_value_heads
    assert facts.decoder.rms_norm_eps == text.rms_norm_eps
    assert facts.decoder.vocab_size == text.vocab_size
    assert facts.decoder.rope_theta == text.rope_theta
    assert facts.vision.depth == vision.depth
    assert facts.vision.intermediate_size == vision.intermediate_size
    assert facts.vision.window_size == vision.window_size
    assert facts.vision.full_attention_blocks == tuple(vision.fullatt_block_indexes)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_every_spelling_of_the_rope_settings_is_read(folder: Path, key: str) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text.pop("rope_scaling", None)
    text.pop("rope_parameters", None)
    text.pop("rope_theta", None)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text.update({key: {**rope, "rope_theta": 5e5}} if key == "rope_parameters" else {key: rope, "rope_theta": 5e5})
    edit_json(folder, "config.json", text_config=text)
    decoder = open_checkpoint(folder).facts.decoder
    assert (decoder.rope_theta, decoder.mrope_section) == (5e5, (2, 3, 3))


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("nested", [True, False, None])
def test_whether_the_head_is_tied_is_read_as_transformers_reads_it(top: bool | None, nested: bool | None) -> None:
    from transformers import Qwen2_5_VLConfig

    config = tiny_config().to_dict()
    for part, value in ((config, top), (config["text_config"], nested)):
        part.pop("tie_word_embeddings", None)
        if value is not None:
            part["tie_word_embeddings"] = value
    expected = Qwen2_5_VLConfig(**json.loads(json.dumps(config))).text_config.tie_word_embeddings
    assert facts_from_config(config, has_head=True).decoder.tied_embeddings is expected
    if nested is None:  # a file that leaves it open and has no head of its own can only mean a tied one
        assert facts_from_config(config, has_head=False).decoder.tied_embeddings is bool(top)


def test_a_copy_of_the_tied_head_is_ignored(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({HEAD: np.zeros((320, 64), np.float32)}))
    assert HEAD not in open_checkpoint(folder).entries


# What cannot be exported ------------------------------------------------------------------------------------------


def test_a_missing_folder_and_a_missing_config_are_named(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "`config.json`" in refusal(tmp_path / "empty")


def test_another_architecture_is_refused_by_name(folder: Path) -> None:
    edit_json(folder, "config.json", model_type="qwen3_vl", architectures=["Qwen3VLForConditionalGeneration"])
    message = refusal(folder)
    assert "Qwen3VLForConditionalGeneration" in message and "Qwen2_5_VLForConditionalGeneration" in message


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    edit_json(folder, "config.json", quantization_config={"quant_method": "awq"})
    assert "awq" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "`hidden_act`: expected 'silu', found 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}}, "add up to head_dim / 2 = 8"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads 5"),
        ({"num_hidden_layers": "two"}, "`num_hidden_layers`: expected a whole number above 0, found 'two'"),
        ({"use_sliding_window": True}, "`use_sliding_window`: expected false, found True"),
    ],
)
def test_settings_that_the_graphs_do_not_have_are_refused(folder: Path, changes: dict[str, Any], expected: str) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text = {key: value for key, value in text.items() if key != "layer_types"}
    edit_json(folder, "config.json", text_config={**text, **changes})
    assert expected in refusal(folder)


def test_a_pickled_checkpoint_is_refused_unread(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "`pytorch_model.bin` is a pickle" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "neither `model.safetensors`" in refusal(folder)


def test_missing_extra_and_misshapen_tensors_are_named_with_their_shapes(folder: Path) -> None:
    norm = next(name for name in load_file(folder / WEIGHTS) if name.endswith("layers.1.input_layernorm.weight"))
    edit_tensors(folder, lambda t: t.update({norm: np.ones(65, np.float32)}))
    assert "layers.1.input_layernorm.weight` expected [64], found [65]" in refusal(folder)
    edit_tensors(folder, lambda t: t.pop(norm))
    assert "lacks 1 of 68 tensors: `model.language_model.layers.1.input_layernorm.weight` [64]" in refusal(folder)
    edit_tensors(folder, lambda t: t.update({norm: np.ones(64, np.float32), "lora_A.weight": np.ones(3, np.float32)}))
    assert "`lora_A.weight`" in refusal(folder)


def test_a_truncated_file_is_told_from_a_whole_one(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        assert "is not a whole safetensors file" in refusal(folder)
    (folder / WEIGHTS).write_bytes(content + b"\0")
    assert "is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4000000000000, 4000000000004]}}',
        b'{"a": {"dtype": "I4", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_malformed_header_is_one_clear_error(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refusal(folder)


def test_a_weight_file_that_cannot_be_read_is_the_checkpoints_fault(folder: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file.os, "preadv", fail)
        assert "cannot be read: Input/output error" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", max_shard_size="300KB")
    shard = sorted((tmp_path / "checkpoint").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path / "checkpoint")


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    index = {"weight_map": {EMBEDDING: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    assert "../elsewhere.safetensors" in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ending", ["layers.0.mlp.up_proj.weight", "embed_tokens.weight", "merger.mlp.0.bias"])
def test_a_value_that_is_no_number_is_refused_by_tensor(folder: Path, value: float, ending: str) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name].reshape(-1)[5] = value

    edit_tensors(folder, poison)
    message = refusal(folder)
    assert ending in message and "1 values that are infinite or not a number" in message


def test_a_value_beyond_float16_asks_for_float32(folder: Path) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        next(tensors[name] for name in tensors if name.endswith("o_proj.weight"))[3, 4] = 1e5

    edit_tensors(folder, enlarge)
    with pytest.raises(CheckpointError, match="float16 ends at 65504") as caught:
        export_checkpoint(folder, folder.parent / "bundle", weights="fp16")
    assert "--weights fp32" in str(caught.value.hint)


def test_a_header_nested_too_deep_is_one_clear_error(folder: Path) -> None:
    header = b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is not a whole safetensors file" in refusal(folder)


def test_names_that_the_system_does_not_take_are_one_clear_error(folder: Path) -> None:
    assert "cannot be read: File name too long" in refusal(folder / ("x" * 300))
    index = {"weight_map": {EMBEDDING: "x" * 300}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "cannot be read: File name too long" in refusal(folder)


# Damaged values ---------------------------------------------------------------------------------------------------

ODD_NUMBERS = (0, 7, 0.5, -3, 10**400, float("inf"), float("nan"))
ODD_VALUES = (*ODD_NUMBERS, None, True, "text", [], ["text"], [None], {}, {"a": 1})


def places(document: Any) -> list[tuple[str | int, ...]]:
    """Paths of all values in a JSON document, containers included."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found: list[tuple[str | int, ...]] = []
    for key, value in items:
        found.append((key,))
        if isinstance(value, (dict, list)):
            found += [(key, *rest) for rest in places(value)]
    return found


def mutations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in places(document):
        for odd in ODD_VALUES:
            changed = json.loads(json.dumps(document))
            parent = changed
            for step in path[:-1]:
                parent = parent[step]
            parent[path[-1]] = odd
            yield changed


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The config as older files have it."""
    return {**config["text_config"], **{key: value for key, value in config.items() if key != "text_config"}}


@pytest.mark.parametrize("layout", [dict, flat])
def test_any_single_odd_value_in_the_config_is_taken_or_refused_clearly(folder: Path, layout: Any) -> None:
    original = layout(json.loads((folder / "config.json").read_text()))
    tokens = TokenIds((1,), (2,), (3,), 4, 5, 6)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    taken = refused = 0
    for config in mutations(original):
        (folder / "config.json").write_text(json.dumps(config))
        try:
            preprocess, _ = read_preprocess(open_checkpoint(folder))
            if taken % 50 == 0:  # most values that are taken change nothing here
                build_probe(preprocess, tokens, tokenizer)
            taken += 1
        except CheckpointError:
            refused += 1
    assert refused > 200 and taken > 200


def test_any_single_odd_value_in_the_preprocessor_is_taken_or_refused_clearly(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    write_preprocessor(folder, size={"shortest_edge": 784, "longest_edge": 50176})
    original = json.loads((folder / "preprocessor_config.json").read_text())
    taken = refused = 0
    for values in mutations(original):
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
        try:
            config, _ = read_preprocess(checkpoint)
            assert np.isfinite([*config.image_mean, *config.image_std]).all()
            taken += 1
        except CheckpointError:
            refused += 1
    assert refused > 50 and taken > 20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rms_norm_eps": None}, "`rms_norm_eps`: expected a number above 0, found None"),
        ({"rope_theta": "1e6"}, "`rope_theta`: expected a number above 0, found '1e6'"),
        ({"rope_scaling": "mrope"}, "`rope_scaling`: expected an object, found 'mrope'"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers`: expected at most 1024"),
    ],
)
def test_an_odd_value_is_named(folder: Path, changes: dict[str, Any], expected: str) -> None:
    config = flat(json.loads((folder / "config.json").read_text()))
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert expected in refusal(folder)


def test_a_config_that_transformers_does_not_take_is_the_checkpoints_fault(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder, "config.json", text_config={**text, "max_position_embeddings": "many", "layer_types": ["odd"]})
    assert "cannot build a model from `config.json`" in refusal(folder)


# Tokenizer and small files ----------------------------------------------------------------------------------------


def test_token_ids_are_found_by_name(folder: Path) -> None:
    found = token_ids((folder / "tokenizer.json").read_bytes(), STREAMO, 320)
    assert found == TokenIds(
        (token_id("</Silence>"),), (token_id("</Standby>"),), (token_id("</Response>"),),
        token_id("<|image_pad|>"), token_id("<|im_end|>"), token_id("<|endoftext|>"),
    )  # fmt: skip


def test_a_model_without_state_tokens_is_refused_unless_it_says_that_it_spells_them(folder: Path) -> None:
    write_tokenizer(folder, SPECIAL_TOKENS[:8])
    assert "lacks the state token `</Silence>`" in refusal(folder)
    (folder / "streamo.json").write_text('{"spelled_states": true, "window_turns": 30}')
    manifest = export_checkpoint(folder, folder.parent / "bundle")
    assert len(manifest.tokens.silence) == len("</Silence>")  # a byte each, in this tokenizer
    assert manifest.stream.window_turns == 30 and manifest.parity["passed"]


def test_missing_small_files_and_tokens_are_named(folder: Path) -> None:
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    assert "`tokenizer.json`" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "no vocabulary" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.replace(b"<|image_pad|>", b"<|picture|>"))
    assert "lacks the token `<|image_pad|>`" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.replace(b'"BPE"', b'"Unheard"'))
    assert "`tokenizer.json` cannot be loaded" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "preprocessor_config.json").unlink()
    assert "`preprocessor_config.json`" in refusal(folder)


@pytest.mark.parametrize("one", ["</Silence>", "</Standby>"])
def test_states_that_share_an_id_are_refused(folder: Path, one: str) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    for token in document["added_tokens"]:
        if token["content"] in (one, "</Response>"):
            token["id"] = token_id(one)
    content = json.dumps(document).encode()
    with pytest.raises(CheckpointError, match=rf"`{one}` the ids \[{token_id(one)}\] and `</Response>`"):
        token_ids(content, STREAMO, 320)


def test_spelled_states_that_share_their_ids_are_refused(folder: Path) -> None:
    write_tokenizer(folder, SPECIAL_TOKENS[:8])
    content = (folder / "tokenizer.json").read_bytes()
    same = replace(STREAMO, standby="</Silence>", silence="</Silence>!")
    with pytest.raises(CheckpointError, match="cannot be told apart"):
        token_ids(content, same, 320, spelled_states=True)


def test_a_negative_id_is_refused(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"][-1]["id"] = -1
    content = json.dumps(document).encode()
    with pytest.raises(CheckpointError, match="has the id -1"):
        token_ids(content, STREAMO, 320)


def test_a_tokenizer_with_more_ids_than_embedding_rows_is_refused(folder: Path) -> None:
    write_tokenizer(folder, (*SPECIAL_TOKENS, *(f"<extra {i}>" for i in range(100))))
    assert "ids up to 366, the embedding table has 320 rows" in refusal(folder)


def test_pixel_limits_are_the_checkpoints_own_unless_they_are_untouched(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    write_preprocessor(folder, min_pixels=784, max_pixels=50176)
    assert read_preprocess(checkpoint) == (PreprocessConfig(min_pixels=784, max_pixels=50176), [])
    write_preprocessor(folder, min_pixels=None, max_pixels=None, size={"shortest_edge": 784, "longest_edge": 50176})
    assert read_preprocess(checkpoint) == (PreprocessConfig(min_pixels=784, max_pixels=50176), [])
    write_preprocessor(folder, max_pixels=12845056)
    config, notes = read_preprocess(checkpoint)
    assert config == PreprocessConfig() and "12845056" in notes[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"patch_size": 16}, "`patch_size`: expected 14 as in `config.json`, found 16"),
        ({"max_pixels": -5}, "`max_pixels`"),
        ({"max_pixels": 100}, "`max_pixels`: expected at least 3136, found 100"),
        ({"image_mean": [0.5]}, "`image_mean`: expected three numbers"),
        ({"image_std": [0, 1, 1]}, "`image_std`: expected three numbers above 0"),
    ],
)
def test_a_preprocessor_that_contradicts_the_model_is_refused(
    folder: Path, changes: dict[str, Any], expected: str
) -> None:
    write_preprocessor(folder, **changes)
    assert expected in refusal(folder)


@pytest.mark.parametrize("content", ['{"window": 3}', '{"window_turns": 0}', '{"window_turns": true}', "[]", "{"])
def test_a_stream_file_with_unknown_or_wrong_values_is_refused(folder: Path, content: str) -> None:
    (folder / "streamo.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"streamo\.json"):
        read_stream_file(open_checkpoint(folder))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_columns_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", dtype=dtype, tied=False)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    for name in (HEAD, "model.language_model.layers.0.mlp.down_proj.weight"):
        expected, reader = checkpoint.read(name), checkpoint.columns(name)
        count, width = expected.shape
        rows = np.zeros((width, count + 5), np.float32)
        for first in range(0, width, 30):
            reader.read_into(rows[first : first + 30, 2 : 2 + count], first)
        np.testing.assert_array_equal(rows[:, 2 : 2 + count], expected.T)
        assert not rows[:, :2].any() and not rows[:, 2 + count :].any()

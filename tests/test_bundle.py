"""A bundle that is not whole is refused by name, with what was expected and what was found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import scripted_bundle

from edge.bundle import open_bundle
from edge.contract import MANIFEST_SCHEMA, MAX_MANIFEST_BYTES, checksum_of, manifest_from_json, manifest_to_json
from edge.errors import BundleError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_bundle(tmp_path_factory.mktemp("whole")).path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    document["checksum"] = checksum_of(document)  # as whoever meant the change would
    (folder / "manifest.json").write_text(json.dumps(document))


def refusal(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_whole_bundle_opens_and_its_manifest_survives_a_round_trip(whole: Path) -> None:
    manifest = open_bundle(whole).manifest
    assert manifest_from_json(json.loads(json.dumps(manifest_to_json(manifest)))) == manifest


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere").message


def test_a_file_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "folder" in refusal(tmp_path / "file").message


def test_a_folder_without_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert "manifest.json" in error.message
    assert "export" in (error.hint or "")


@pytest.mark.parametrize("name", ["tokenizer.json", "embeddings.bin", "vision.onnx", "decoder.onnx"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder).message


def test_a_renamed_file_is_named(folder: Path) -> None:
    (folder / "embeddings.bin").rename(folder / "embedding.bin")
    assert "embeddings.bin" in refusal(folder).message


def test_a_truncated_file_is_named_with_both_sizes(folder: Path) -> None:
    path = folder / "embeddings.bin"
    full_bytes = path.stat().st_size
    os.truncate(path, full_bytes - 7)
    message = refusal(folder).message
    assert "embeddings.bin" in message
    assert str(full_bytes) in message
    assert str(full_bytes - 7) in message


def test_an_altered_file_is_named_with_both_hashes(folder: Path) -> None:
    data = bytearray((folder / "embeddings.bin").read_bytes())
    data[11] ^= 1
    (folder / "embeddings.bin").write_bytes(data)
    message = refusal(folder).message
    assert "altered" in message
    assert "sha256" in message


def test_a_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    shutil.move(folder / "embeddings.bin", outside)
    (folder / "embeddings.bin").symlink_to(outside)
    assert "link" in refusal(folder).message


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("decoder_facts", "rope_theta", 10.0), ("protocol", "system_prompt", ""), ("preprocess", "patch_size", 0)],
)
def test_an_altered_manifest_is_refused(folder: Path, section: str, field: str, value: object) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    document[section][field] = value
    (folder / "manifest.json").write_text(json.dumps(document))
    assert "altered" in refusal(folder).message


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_path_that_no_system_takes_is_refused(path: str) -> None:
    refusal(Path(path))


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a/b", "..", ".hidden", "a\0b", ""])
def test_a_name_that_is_not_plain_is_refused(folder: Path, name: str) -> None:
    change_manifest(folder, lambda d: d["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    assert "plain names" in refusal(folder).message


def test_another_schema_is_refused_with_both_versions(folder: Path) -> None:
    change_manifest(folder, lambda d: d.update(schema="streamo.bundle/9"))
    message = refusal(folder).message
    assert "streamo.bundle/9" in message
    assert MANIFEST_SCHEMA in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("tokens"), "tokens"),
        (lambda d: d["decoder_facts"].pop("layers"), "decoder_facts.layers"),
        (lambda d: d["decoder_facts"].update(layers="six"), "decoder_facts.layers"),
        (lambda d: d["decoder_facts"].update(layers=True), "decoder_facts.layers"),
        (lambda d: d["preprocess"].update(image_mean=[0.5]), "preprocess.image_mean"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["embedding"].update(file="other.bin"), "other.bin"),
        (lambda d: d["embedding"].update(rows=1), "Embedding table"),
        (lambda d: d["embedding"].update(dtype="complex"), "complex"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, change: Callable[[dict[str, Any]], object], named: str) -> None:
    change_manifest(folder, change)
    assert named in refusal(folder).message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000])
def test_a_manifest_that_is_not_an_object_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    refusal(folder)


def test_an_enormous_manifest_is_refused_unread(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    assert str(MAX_MANIFEST_BYTES) in refusal(folder).message


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_mutated_manifest_crashes_the_reader(whole: Path, data: st.DataObject) -> None:
    text = (whole / "manifest.json").read_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    mutated = text[:start] + data.draw(st.text(max_size=12)) + text[end:]
    try:
        manifest_from_json(json.loads(mutated))
    except (BundleError, ValueError) as error:
        assert isinstance(error, (BundleError, json.JSONDecodeError))

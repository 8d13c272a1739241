"""A bundle that computes something else than where it was exported is refused at its first run, and told where."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import needs_kernels
from tiny_checkpoint import write_checkpoint

from edge import StreamSession, first_run
from edge.backends import load_backend
from edge.backends.ort import OrtBackend
from edge.bundle import Bundle, open_bundle
from edge.errors import BundleError, ParityError
from edge.first_run import check_first_run, compare_turns
from edge.stored_turns import read_stored_turns, sketch

onnx = pytest.importorskip("onnx")
pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streamo-edge" / "passed"


@pytest.fixture
def copied(demo_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the demonstration's bundle, to be spoilt."""
    return open_bundle(shutil.copytree(demo_bundle.path, tmp_path / "copied"))


def spoil(bundle: Bundle, component: str, weight: str) -> Bundle:
    """Overwrite a weight of a component's data file with noise."""
    graph = onnx.load(bundle.path / f"{component}.native.onnx", load_external_data=False).graph
    place = next(
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.name == weight
    )
    data = bundle.path / place["location"]
    values = np.memmap(data, np.float32, "r+", int(place["offset"]), (int(place["length"]) // 4,))
    values[:] = np.random.default_rng(0).standard_normal(len(values), np.float32) * np.abs(values).max()
    values.flush()
    return open_bundle(bundle.path, verify=False)


def refusal(bundle: Bundle) -> str:
    with pytest.raises(ParityError) as caught:
        load_backend("cpu", bundle, threads=1)
    assert caught.value.exit_code == 3
    return caught.value.message


def test_the_first_run_is_checked_and_the_second_is_not(
    demo_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OrtBackend(demo_bundle, threads=1)
    start = time.perf_counter()
    found = check_first_run(demo_bundle, backend, "cpu")
    assert time.perf_counter() - start < 2
    assert found is not None and found.passed and found.figures["top1_agreement"] == 1
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["facts"]["backend"] == "cpu"
    monkeypatch.setattr(first_run, "compare_turns", None)
    assert check_first_run(demo_bundle, backend, "cpu") is None


def test_another_version_or_device_is_another_first_run(demo_bundle: Bundle, cache: Path) -> None:
    backend = OrtBackend(demo_bundle, threads=1)
    assert check_first_run(demo_bundle, backend, "cpu") is not None
    backend.identity["onnxruntime"] = "9.9"
    assert check_first_run(demo_bundle, backend, "cpu") is not None
    assert check_first_run(demo_bundle, backend, "cuda") is not None
    assert len(list(cache.glob("*.json"))) == 3


def test_a_cache_that_cannot_be_written_only_costs_time(demo_bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    backend = OrtBackend(demo_bundle, threads=1)
    for _ in range(2):
        assert check_first_run(demo_bundle, backend, "cpu") is not None


@pytest.mark.parametrize(
    ("component", "weight", "culprit"),
    [
        ("decoder", "layers.2.down.weight", "Layer 3's cached"),
        ("decoder", "layers.1.qkv.weight", "Layer 1's cached"),
        ("decoder", "final_norm", "the head"),
        ("vision", "blocks.1.qkv.weight", "vision tower"),
    ],
)
def test_garbage_is_refused_and_where_it_begins_is_named(
    copied: Bundle, cache: Path, component: str, weight: str, culprit: str
) -> None:
    message = refusal(spoil(copied, component, weight))
    assert culprit in message and "backend cpu" in message and "expected" in message
    assert not list(cache.glob("*.json"))


def test_a_session_refuses_it_too_unless_told_not_to_look(copied: Bundle) -> None:
    spoilt = spoil(copied, "decoder", "layers.2.down.weight")
    with pytest.raises(ParityError):
        StreamSession(spoilt, threads=1)
    StreamSession(spoilt, threads=1, check_first_run=False)


def test_logits_that_are_no_numbers_are_refused(demo_bundle: Bundle) -> None:
    class Broken(OrtBackend):
        def run_decoder(self, *arguments: Any) -> np.ndarray:
            return super().run_decoder(*arguments) * np.float32("nan")

    with pytest.raises(ParityError, match="kl_mean nan"):
        check_first_run(demo_bundle, Broken(demo_bundle, threads=1), "cpu")


def test_a_bundle_without_stored_turns_runs_unchecked(demo_bundle: Bundle) -> None:
    import dataclasses

    older = Bundle(demo_bundle.path, dataclasses.replace(demo_bundle.manifest, stored_turns=""))
    assert check_first_run(older, OrtBackend(older, threads=1), "cpu") is None


def test_stored_turns_that_cannot_be_read_are_told_as_the_bundles_fault(copied: Bundle) -> None:
    path = copied.file(copied.manifest.stored_turns)
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"turns\.npz"):
        load_backend("cpu", copied, threads=1)


def test_the_file_is_small_and_the_same_each_time(demo_bundle: Bundle) -> None:
    path = demo_bundle.file(demo_bundle.manifest.stored_turns)
    assert path.stat().st_size < 1 << 20
    assert read_stored_turns(path).to_bytes() == path.read_bytes()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_int8_cache_without_offset_and_bias_is_compared_with_what_it_should_hold(
    tmp_path: Path, weights: str
) -> None:
    from export.api import export_checkpoint, record_reference

    write_checkpoint(tmp_path / "checkpoint", key_bias_norm=605)
    record_reference(tmp_path / "checkpoint", tmp_path / "reference.npz")
    options = {"weights": weights, "reference": tmp_path / "reference.npz", "allow_mismatch": True}
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", **options)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.key_offset_layers
    turns = read_stored_turns(bundle.file(bundle.manifest.stored_turns))
    backend = OrtBackend(bundle, threads=1)
    assert compare_turns(bundle, backend, turns).passed
    errors = first_run._layer_errors(bundle.manifest, backend, turns)
    assert 0 < max(max(pair) for pair in errors) < 0.1


def test_a_sketch_estimates_the_norm_of_a_difference() -> None:
    random = np.random.default_rng(0)
    one, other = random.standard_normal((2, 500, 300), np.float32)
    ratio = np.linalg.norm(sketch(one) - sketch(other)) / np.linalg.norm(one - other) / 16**0.5
    assert 0.9 < ratio < 1.1

"""`streamo-edge build` and `build-plugin`: what they print, and what they end with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_world import Device, make_device, small_bundle

from apps.cli.main import main
from edge.engines import plugin_build


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("build"), weights="fp16")


@pytest.fixture
def device(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from make_device(bundle, tmp_path, monkeypatch)


def test_build_ends_with_the_engines_as_one_json_document(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(device.bundle.path), "--engines", str(tmp_path / "kept"), "--json"]
    assert main([*command, "--workspace-mib", "64", "--optimization-level", "1"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out.splitlines()[-1])
    assert (document["device"], document["sm"], document["tensorrt"]) == ("Orin", 87, "10.3.0")
    assert [engine["component"] for engine in document["engines"]] == ["vision", "decoder"]
    for engine in document["engines"]:
        assert not engine["found"] and engine["bytes"] == Path(engine["path"]).stat().st_size
        assert Path(engine["path"]).parent == tmp_path / "kept"
    assert document["engines"][1]["profiles"]["turn"]["T"] == [2, 144, 512]
    assert "Building the decoder engine for Orin" in said.err and "decoder: Building Engine" in said.err
    assert device.world.calls.named("set_memory_pool_limit")[0][1] == 64 << 20

    assert main(command) == 0, "other options are another engine"
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ["for sizes with hash" in engine["reason"] for engine in again["engines"]] == [True, True]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [engine["found"] for engine in found["engines"]] == [True, True]


def test_build_without_json_prints_a_table(device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(device.bundle.path), "--engines", str(tmp_path / "kept")]) == 0
    out = capsys.readouterr().out
    assert "TensorRT 10.3.0 engines for Orin (SM 87)" in out and "decoder.sm87.trt10.3.0.engine" in out


def test_what_is_wrong_ends_with_its_exit_code_and_a_hint(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device.world.refused = {"StreamoTableAttention"}
    assert main(["build", str(device.bundle.path), "--engines", str(tmp_path / "kept")]) == 3
    said = capsys.readouterr()
    assert said.out == "" and "error: TensorRT 10.3.0 cannot read `decoder.tensorrt.onnx`" in said.err
    assert "hint: " in said.err and "Traceback" not in said.err
    device.gpu.free_bytes = 1
    assert main(["build", str(device.bundle.path), "--engines", str(tmp_path / "kept"), "--force"]) == 5


def test_build_plugin_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_build, "TENSORRT_FOLDERS", (str(tmp_path),))
    assert main(["build-plugin"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and "TensorRT's C++ headers are missing: there is no `NvInfer.h`" in said.err
    assert "hint: sudo apt install libnvinfer-headers-dev, or give --tensorrt DIR" in said.err

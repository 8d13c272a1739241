"""`bench decoder`: a random bundle of a known shape, written whole or not at all, opened and timed by the runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu_interpreter import IdleCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

from apps.bench import decoder, random_bundle, random_model
from apps.bench.decoder_worker import Model
from apps.bench.random_bundle import Recipe
from apps.cli.main import main
from edge.backends.cuda import CudaBackend
from edge.bundle import open_bundle
from edge.capacity import plan_for_bundle
from edge.contract import key_cache_name, key_scales_name

DEMO = Recipe("demo")


def quiet(what: str, done: float, total: float) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


def command(folder: Path, *more: str) -> list[str]:
    return ["bench", "decoder", "--shape", "demo", "--depth", "0,64", "--tokens", "16", "--repeats", "1",
            "--threads", "1", "--workdir", str(folder), *more]  # fmt: skip


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_random_bundle_opens_and_is_planned_like_any_other(folder: Path, weights: str, kv: str) -> None:
    recipe = Recipe("demo", weights, kv, block=64)
    bundle = open_bundle(random_bundle.make(recipe, folder, quiet))
    assert set(bundle.manifest.kv_dtypes) == {{"fp32": "float32", "int8": "int8"}[kv]}
    assert bundle.manifest.decoder.weights == weights and not bundle.manifest.parity
    assert plan_for_bundle(bundle).total_bytes > 0
    model = Model(bundle, "cpu", threads=1, capacity_tokens=80)
    model.append(16, 64)
    model.encode()
    assert model.elapsed_ms > 0


@pytest.mark.parametrize("shape", ["qwen2.5-vl-3b", "qwen2.5-vl-7b"])
def test_the_bytes_that_are_announced_are_those_of_the_real_shape(shape: str) -> None:
    parameters = {"qwen2.5-vl-3b": 3.75e9, "qwen2.5-vl-7b": 8.29e9}[shape]  # as their authors count them
    fp16 = Recipe(shape, "fp16", "fp32").bytes
    assert 2 * parameters < fp16 < 2 * parameters * 1.06
    assert Recipe(shape).bytes < fp16 / 2


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_the_bytes_that_are_announced_are_written(folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = random_bundle.SHAPES["demo"]
    facts = replace(demo.decoder, hidden_size=512, head_dim=128, intermediate_size=2048)
    tower = replace(demo.vision, hidden_size=640, intermediate_size=1700, out_hidden_size=512)
    monkeypatch.setitem(random_bundle.SHAPES, "wide", replace(demo, decoder=facts, vision=tower))
    recipe = Recipe("wide", weights)
    written = sum(file.bytes for file in open_bundle(random_bundle.make(recipe, folder, quiet)).manifest.files.values())
    assert written < recipe.bytes < 1.06 * written


@needs_kernels
def test_the_command_ends_with_every_figure_as_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--json")) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["shape"] == "demo" and result["native"] and result["vision_ms"] > 0 and result["rss_peak_mb"] > 20
    assert list(result["append_ms"]) == list(result["decode_ms_per_token"]) == ["0", "64"]
    assert all(ms > 0 for ms in [*result["append_ms"].values(), *result["decode_ms_per_token"].values()])
    assert all(0 < rate < 1e3 / result["vision_min_ms"] for rate in result["turns_per_s"].values())
    assert result["peaks"]["read_gbs"] > 0 and set(result["read_fraction_of_peak"]) == {"0", "64"}
    assert "MB of random weights to" in err and "cached tokens" in err


def test_a_bundle_is_written_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_bundle.make(DEMO, folder, quiet)
    assert random_bundle.find(DEMO, folder) == path
    assert random_bundle.find(Recipe("demo", block=128), folder) is None
    monkeypatch.setattr("export.fingerprint.code_fingerprint", lambda *_: "other")
    assert random_bundle.find(DEMO, folder) is None  # made by other code


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_model, "add_decoder", interrupted)
    assert main(command(tmp_path)) == 130
    assert not list(tmp_path.iterdir())


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(words)
    return code, capsys.readouterr().err


def test_too_little_memory_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoder, "free_bytes", lambda backend: 300_000_000)
    code, said = failure(["bench", "decoder", "--shape", "qwen2.5-vl-3b", "--workdir", str(tmp_path)], capsys)
    assert code == 5 and "300.0 MB is free" in said and "GB of memory" in said and "--depth" in said
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage: Callable[[object], object] = lambda _: type("Usage", (), {"free": 20_000_000, "total": 1, "used": 1})()  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    code, said = failure(command(tmp_path), capsys)
    assert code == 1 and "20 MB" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--depth", "0,x", "a whole number of tokens"),
        ("--depth", "-5", "at least 0"),
        ("--tokens", "513", "1 to 512"),
        ("--shape", "qwen2.5-vl-5b", "qwen2.5-vl-3b"),
        ("--weights", "int3", "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = failure(command(folder, f"{option}={value}"), capsys)
    assert code == 2 and said in message and "Traceback" not in message


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(decoder.sys, "executable", "/bin/false")
    monkeypatch.setattr(decoder, "_peaks", lambda *_: {})
    code, said = failure(command(tmp_path), capsys)
    assert code == 1 and "ended with code 1" in said


def test_a_gpu_that_is_not_there_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "none.so"))
    code, said = failure(command(tmp_path, "--backend", "cuda"), capsys)
    assert code == 1 and "driver cannot be loaded" in said and not list(tmp_path.iterdir())


@needs_triton
@needs_compiler
def test_a_cache_on_a_gpu_is_filled_and_a_step_there_is_timed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(random_bundle.make(DEMO, folder, quiet))
    with IdleCuda(tmp_path).in_use():
        on_gpu = CudaBackend(bundle, threads=1, on_host=True)
        monkeypatch.setattr("apps.bench.decoder_worker.load_backend", lambda *_, **__: on_gpu)
        model = Model(bundle, "cuda", threads=1, capacity_tokens=80)
        model.append(1, 64)
        keys, scales = (on_gpu.gpu.numpy(on_gpu.cache[name(0)]) for name in (key_cache_name, key_scales_name))
    assert np.abs(keys).max() == 127 and (scales == np.float32(0.02)).all()
    assert model.result.shape == (bundle.manifest.decoder_facts.vocab_size,)

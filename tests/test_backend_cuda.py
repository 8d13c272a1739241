"""The CUDA backend: whole streams through ONNX Runtime with the GPU kernels in Triton's interpreter, and its errors.

The graph's operators are registered in ONNX Runtime's CPU provider (`on_host`) and launch the kernels through the real
launcher on a driver of the tests' own, whose device memory is the host's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, IdleCuda, needs_compiler, needs_triton
from gpu_interpreter import variants as gpu_kernels
from kernel_cases import needs_kernels
from tiny_checkpoint import write_checkpoint

from apps.cli.main import main
from edge import StreamSession, backends
from edge.backends import load_backend
from edge.backends.cuda import CudaBackend
from edge.backends.cuda_provider import PROVIDER
from edge.backends.ort import OrtBackend
from edge.backends.ort_session import OrtSession, Provider
from edge.backends.place import DevicePlace
from edge.bundle import Bundle, open_bundle
from edge.decoder import Decoder
from edge.errors import (
    BackendError,
    DeviceError,
    DeviceLostError,
    FrameError,
    MemoryBudgetError,
    ParityError,
    UsageError,
)
from edge.first_run import check_first_run
from edge.gpu_arrays import DeviceArray
from edge.native import library_path
from edge.vision import VisionEncoder

pytestmark = [needs_kernels, needs_triton, needs_compiler]

FRAMES = [np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8) for seed in range(4)]
ASK = ("--ask", "What happens?", "--pace", "fast")
LOST = 700  # an illegal address


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCuda]:
    cuda = IdleCuda(tmp_path)
    with cuda.in_use():
        yield cuda


@pytest.fixture(scope="module")
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A checkpoint of two layers whose heads are as wide as the GPU kernels want them; the parameter is its weights."""
    from export.api import export_checkpoint, record_reference

    folder = tmp_path_factory.mktemp("tiny")
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64, "vision_depth": 1, "vision_hidden": 64, "vision_heads": 2}
    write_checkpoint(folder / "checkpoint", key_bias_norm=605, intermediate_size=128, **shape)
    record_reference(folder / "checkpoint", folder / "reference.npz")
    options = {"weights": request.param, "reference": folder / "reference.npz", "allow_mismatch": True}
    export_checkpoint(folder / "checkpoint", folder / "bundle", **options)
    return open_bundle(folder / "bundle")


def conversation(bundle: Bundle, backend: Any) -> list[np.ndarray]:
    """A prompt with a frame, a decode step, and an append after the prompt's first tokens have left the cache: the
    frame's tokens, and the logits after each.
    """
    decoder = Decoder(bundle.manifest, bundle.file(bundle.manifest.embedding.file), backend, capacity_tokens=20)
    encoder = VisionEncoder(bundle.manifest, backend)
    resized = encoder.resize(FRAMES[0])
    frame = encoder.encode(resized, encoder.patches(resized))
    found = [np.array(frame.embeds), np.array(decoder.prefill([[1, 2]]))]
    start = decoder.kv_cache.mark()
    found.append(np.array(decoder.prefill([[3, 4], frame, [5]])))
    end = decoder.kv_cache.mark()
    found.append(np.array(decoder.decode_step(6)))
    decoder.kv_cache.evict(start, end.behind(-1, -1))
    found.append(np.array(decoder.prefill([[7, 8]])))
    return found


@pytest.mark.parametrize(
    "tiny_bundle",
    ["int8", pytest.param("int4", marks=pytest.mark.slow), pytest.param("fp32", marks=pytest.mark.slow)],
    indirect=True,
)
def test_a_whole_model_on_the_gpu_kernels_gives_nearly_what_the_cpu_gives(tiny_bundle: Bundle, tmp_path: Path) -> None:
    cuda = FakeCuda(tmp_path, watch=False)
    with cuda.in_use():
        on_gpu = conversation(tiny_bundle, CudaBackend(tiny_bundle, threads=1, on_host=True))
    weights = tiny_bundle.manifest.decoder.weights
    for found, expected in zip(on_gpu, conversation(tiny_bundle, OrtBackend(tiny_bundle, threads=1)), strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < (2e-3 if weights == "fp32" else 0.1)
    kernels = {"append", "attend", "window"} | ({"product"} if weights != "fp32" else set())
    assert kernels <= {name.split("_")[0] for name, _ in cuda.launched}


@pytest.fixture
def backend(demo_bundle: Bundle, fake: FakeCuda) -> CudaBackend:
    return CudaBackend(demo_bundle, threads=1, on_host=True)


def test_the_cache_and_everything_a_run_needs_stay_on_the_device_and_are_allocated_once(
    demo_bundle: Bundle, backend: CudaBackend, fake: FakeCuda
) -> None:
    session = StreamSession(demo_bundle, backend=backend, window_turns=3, max_reply_tokens=2)
    session.ask("?")
    blocks = []
    for t in range(6):
        session.push(FRAMES[0], t)
        blocks.append((fake["blocks"], fake["block_bytes"]))
    assert all(isinstance(array, DeviceArray) for array in backend.cache.values())
    assert len(set(blocks[1:])) == 1


def test_a_frames_tokens_stay_on_the_device_and_of_a_reply_only_its_tokens_leave_it(
    demo_bundle: Bundle, backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    original = DevicePlace.read

    def spying(self: DevicePlace, array: Any) -> np.ndarray:
        read.append(array.shape)
        return original(self, array)

    session = StreamSession(demo_bundle, backend=backend, window_turns=3, max_reply_tokens=2)
    session.ask("?")
    monkeypatch.setattr(DevicePlace, "read", spying)
    session.push(FRAMES[0], 0)
    logits, token = (1, demo_bundle.manifest.decoder_facts.vocab_size), (1,)
    assert read == [logits, token]  # those that the turn's state is read from, then what was chosen on the device


def test_a_frame_on_the_gpu_is_resized_and_cut_there(
    demo_bundle: Bundle, backend: CudaBackend, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any("frame" in name or "resize" in name for name in gpu_kernels()):
        pytest.skip("there are no kernels for frames yet")
    monkeypatch.setattr("edge.vision.patchify", None)
    session = StreamSession(demo_bundle, backend=backend, window_turns=3, max_reply_tokens=2)
    session.ask("?")
    fake.launched.clear()
    session.push(backend.gpu.array(FRAMES[0]), 0)
    first = fake.launched[0][0]
    assert "frame" in first or "resize" in first


def test_a_frame_on_another_gpu_is_refused_and_nothing_is_lost(demo_bundle: Bundle, backend: CudaBackend) -> None:
    session = StreamSession(demo_bundle, backend=backend, window_turns=3, max_reply_tokens=2)
    elsewhere = dataclasses.replace(backend.gpu.array(FRAMES[0]), device=1)
    with pytest.raises(FrameError, match="should be on GPU 0, as the backend is, found it on GPU 1"):
        session.push(elsewhere, 0)
    session.push(dataclasses.replace(elsewhere, device=0), 0)


def test_kernels_that_compute_nothing_are_refused_at_the_first_run(
    demo_bundle: Bundle, backend: CudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert {"gpu", "sm", "driver", "gpu kernels"} <= backend.identity.keys()
    with pytest.raises(ParityError, match=r"backend cuda \(.*gpu Fake GPU 0.*vision tower") as caught:
        check_first_run(demo_bundle, backend, "cuda")
    assert caught.value.hint == "Use `--backend cpu`"


def test_operators_of_one_name_stand_side_by_side_for_both_providers(demo_bundle: Bundle, fake: FakeCuda) -> None:
    entries = {"streamo.gpu": "0", "streamo.gpu.kernels": str(fake.cubins)}
    path = demo_bundle.file(demo_bundle.manifest.decoder.native_file)
    OrtSession(path, "fp32", threads=1, library=library_path(), provider=Provider(entries=entries))
    fake.set(devices=0)
    entries["streamo.gpu.kernels"] += "/"  # so that it is another device than before
    with pytest.raises(BackendError, match="shows 0"):
        OrtSession(path, "fp32", threads=1, library=library_path(), provider=Provider(entries=entries))


def test_where_each_component_runs_is_told(backend: CudaBackend) -> None:
    assert backend.placement == dict.fromkeys(("vision", "decoder"), "Fake GPU 0 (SM 8.7), native graph")


# What can be missing


def error_of(demo_bundle: Bundle, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code, and what `run --backend cuda` says; one error, at most one hint."""
    code = main(
        ["run", str(demo_bundle.path), "--source", "synthetic:table?seconds=2", *ASK, "--backend", "cuda", *words]
    )
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == sum(line.startswith("hint: ") for line in lines) == 1
    return code, "\n".join(lines)


def test_no_driver_no_gpu_and_an_old_driver_are_told(
    demo_bundle: Bundle, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "no_such_driver.so"))
    code, said = error_of(demo_bundle, capfd)
    assert code == 1 and "driver cannot be loaded" in said and "--backend cpu" in said
    for settings, words in (({"devices": 0}, "no GPU"), ({"driver": 11040}, "too old")):
        (folder := tmp_path / words.split()[0]).mkdir()
        with FakeCuda(folder, **settings).in_use():
            code, said = error_of(demo_bundle, capfd)
            assert code == 1 and words in said


def test_a_gpu_without_kernels_is_told(demo_bundle: Bundle, capfd: pytest.CaptureFixture[str], fake: FakeCuda) -> None:
    for file in fake.cubins.iterdir():
        file.unlink()
    code, said = error_of(demo_bundle, capfd)
    assert code == 1 and "no GPU kernels for compute capability 8.7" in said


def test_an_onnxruntime_without_cuda_is_told(
    demo_bundle: Bundle, capfd: pytest.CaptureFixture[str], fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    code, said = error_of(demo_bundle, capfd)
    assert code == 1 and "build without CUDA" in said and "onnxruntime-gpu" in said


class FakeRuntime(SimpleNamespace):
    """The part of onnxruntime-gpu's module that the backend uses; its provider cannot be loaded, or is left out."""

    class SessionOptions:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

    class InferenceSession:
        def __init__(self, path: str, options: Any, providers: Any, enable_fallback: int) -> None:
            assert enable_fallback == 0 and providers[0][0] == "CUDAExecutionProvider"

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    __version__ = "1.31.1"

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the fake runtime's libraries, which is in use."""
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeRuntime(__file__=str(tmp_path / "onnxruntime" / "__init__.py")))
    return tmp_path / "onnxruntime" / "capi"


def test_a_provider_that_does_not_load_is_told_with_the_library_that_is_missing(
    demo_bundle: Bundle, capfd: pytest.CaptureFixture[str], fake: FakeCuda, runtime: Path
) -> None:
    (runtime / "libonnxruntime_providers_cuda.so").write_bytes(b"not a library")
    code, said = error_of(demo_bundle, capfd)
    assert code == 1 and "libonnxruntime_providers_cuda.so" in said and "onnxruntime-gpu[cuda,cudnn]" in said


def test_a_session_that_onnxruntime_gave_to_the_cpu_is_refused(
    demo_bundle: Bundle, fake: FakeCuda, runtime: Path
) -> None:
    with pytest.raises(BackendError, match=r"would run .* with CPUExecutionProvider, expected CUDAExecutionProvider"):
        load_backend("cuda", demo_bundle)


def test_a_required_gpu_refuses_the_cpu(demo_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="a GPU is required"):
        load_backend("cpu", demo_bundle, require_gpu=True)
    code = main(["run", str(demo_bundle.path), "--source", "synthetic:table?seconds=2", *ASK, "--require-gpu"])
    assert code == 2 and "--backend cuda" in capfd.readouterr().err


def test_weights_that_do_not_fit_are_refused_with_the_parts_before_anything_is_loaded(
    demo_bundle: Bundle, fake: FakeCuda
) -> None:
    fake.set(memory=1 << 20)
    with pytest.raises(MemoryBudgetError, match=r"needs .*B on Fake GPU 0: .*B for weights.*B is free") as caught:
        CudaBackend(demo_bundle, on_host=True)
    assert caught.value.exit_code == 5


def test_a_window_that_does_not_fit_is_refused_with_the_one_that_would(
    demo_bundle: Bundle, backend: CudaBackend, fake: FakeCuda
) -> None:
    fake.set(memory=100 << 20)
    with pytest.raises(MemoryBudgetError, match=r"window of 20000 turns needs .* is free") as caught:
        StreamSession(demo_bundle, backend=backend, window_turns=20_000)
    assert "--window" in (caught.value.hint or "")


def test_memory_that_runs_out_during_a_run_is_told(demo_bundle: Bundle, backend: CudaBackend, fake: FakeCuda) -> None:
    session = StreamSession(demo_bundle, backend=backend, window_turns=3)
    fake.set(alloc_fails_at=1)
    with pytest.raises(MemoryBudgetError, match="memory"):
        session.push(FRAMES[0], 0)


def test_what_onnxruntime_says_is_told_with_what_matters(backend: CudaBackend) -> None:
    told = backend._diagnose(RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 99"))
    assert isinstance(told, MemoryBudgetError) and "free of" in told.message
    told = backend._diagnose(RuntimeError("CUDA failure 209: no kernel image is available for execution on the device"))
    assert isinstance(told, BackendError) and "no machine code of its own for Fake GPU 0 (SM 8.7)" in told.message
    assert backend._diagnose(RuntimeError("Name:'layers.0' Status Message: no such thing")) is None


def test_a_lost_device_ends_the_command_with_70_within_a_second_and_serves_no_further_turn(
    demo_bundle: Bundle,
    backend: CudaBackend,
    fake: FakeCuda,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(backends, "load_backend", lambda *_, **__: backend)
    monkeypatch.setattr("edge.session.load_backend", lambda *_, **__: backend)
    frames, encode = [], backend.encode

    def failing(*arguments: Any) -> Any:
        frames.append(time.monotonic())
        if len(frames) == 2:
            fake.set(launch_fails_at=1, launch_error=LOST)
        return encode(*arguments)

    monkeypatch.setattr(backend, "encode", failing)
    events = tmp_path / "events.jsonl"
    code, said = error_of(demo_bundle, capfd, "--output", str(events), "--every-turn")
    assert code == 70 and "Restart this process" in said
    assert time.monotonic() - frames[1] < 1
    assert len(frames) == 2 and events.read_text().count('"turn.state"') == 1
    with pytest.raises(DeviceLostError):
        backend.allocate_cache(10)


def test_a_bundle_without_native_graphs_is_refused(demo_bundle: Bundle, fake: FakeCuda) -> None:
    stock = dataclasses.replace(demo_bundle.manifest.decoder, native_file="")
    bundle = Bundle(demo_bundle.path, dataclasses.replace(demo_bundle.manifest, decoder=stock))
    with pytest.raises(BackendError, match="none of its decoder"):
        CudaBackend(bundle)


def test_doctor_says_what_each_backend_lacks(
    capfd: pytest.CaptureFixture[str], fake: FakeCuda, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(["doctor", str(demo_bundle.path)]) == 0
    said = capfd.readouterr().out
    assert "Fake GPU 0" in said and "kernels for sm" in said and "87" in said
    assert "build without CUDA" in said or PROVIDER in said
    assert "not usable: TensorRT is not installed" in said


def test_doctor_without_a_gpu_says_why(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "none.so"))
    assert main(["doctor", "--json"]) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert "driver cannot be loaded" in document["gpu"]["reason"] and "driver cannot be loaded" in captured.err
    assert document["backends"]["cuda"] == document["backends"]["tensorrt"] == "not usable: no GPU, see above"
    with pytest.raises(DeviceError):
        backends.free_bytes("cuda")

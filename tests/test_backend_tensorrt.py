"""The TensorRT backend: memory, profiles and the cache, with engines that run their graphs in onnx's evaluator.

The CPU backend is the reference: another implementation of the same bundle.
"""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_world import Device, Heard, make_device, small_bundle
from kernel_cases import needs_kernels

from edge import contract
from edge.backends import evicts_in_place, load_backend
from edge.backends import tensorrt as backend_module
from edge.backends.base import CacheView
from edge.backends.ort import OrtBackend
from edge.backends.tensorrt import TensorRTBackend
from edge.decoder import Decoder, FrameTokens
from edge.engines.plugin import PLUGIN_VARIABLE
from edge.engines.profiles import MOST_CACHED_TOKENS
from edge.errors import BackendError, DeviceLostError, EngineError, MemoryBudgetError
from edge.kv_cache import CacheMark

RELATIVE_ERROR = 0.05
"""The CPU's products round activations to 8 bits, the engine's to float16."""


@pytest.fixture(scope="module", params=["int8", "fp32"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("backend"), weights="fp16", kv=request.param)


@pytest.fixture
def device(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from make_device(bundle, tmp_path, monkeypatch)


def loaded(device: Device) -> TensorRTBackend:
    return TensorRTBackend(device.bundle, listener=Heard().listener, engines=device.folder / "engines")


def decoder_of(device: Device, backend: TensorRTBackend | OrtBackend, capacity: int = 96) -> Decoder:
    table = device.bundle.file(device.bundle.manifest.embedding.file)
    return Decoder(device.bundle.manifest, table, backend, capacity)


def talk(decoder: Decoder, frame: np.ndarray) -> list[np.ndarray]:
    """A prompt with a frame, some replies, a turn cut out of the middle, and more."""
    found = [np.array(decoder.prefill([list(range(20)), FrameTokens(frame, 2, 2), [7, 8]]))]
    start = decoder.kv_cache.mark()
    found.append(np.array(decoder.prefill([[30, 31, 32], FrameTokens(frame, 2, 2)])))
    end = decoder.kv_cache.mark()
    found += [np.array(decoder.decode_step(token)) for token in (3, 4)]
    decoder.kv_cache.evict(start, end)
    found.append(np.array(decoder.prefill([[40, 41, 42, 43, 44, 45, 46, 47, 48, 49]])))
    found.append(np.array(decoder.decode_step(5)))
    return found


@needs_kernels
def test_a_conversation_with_a_turn_cut_out_gives_the_cpus_logits(device: Device) -> None:
    frame = np.random.default_rng(3).normal(size=(4, device.bundle.manifest.decoder_facts.hidden_size))
    frame = frame.astype(np.float32)
    on_cpu, on_device = OrtBackend(device.bundle, threads=1), loaded(device)
    wanted = talk(decoder_of(device, on_cpu), frame)
    found = talk(decoder_of(device, on_device), frame)
    slots = np.array([0, 5, 24])
    for own, other in zip(on_device.cached_rows(1, slots), on_cpu.cached_rows(1, slots), strict=True):
        assert own.shape == other.shape and np.abs(own - other).max() <= RELATIVE_ERROR * np.abs(other).max()
    for expected, logits in zip(wanted, found, strict=True):
        assert np.abs(logits - expected).max() <= RELATIVE_ERROR * np.abs(expected).max()
    runs = [profile for name, profile, _ in device.world.executions if name == contract.TENSORRT_DECODER_FILE]
    assert runs == [1, 1, 0, 0, 1, 0], "one token has a profile of its own"


@needs_kernels
def test_a_frame_gives_the_cpus_visual_tokens(device: Device) -> None:
    rows, columns = 4, 6
    generator = np.random.default_rng(4)
    patches = generator.normal(size=(rows * columns, 3 * device.bundle.manifest.preprocess.patch_size**2))
    patches = patches.astype(np.float32)
    wanted = OrtBackend(device.bundle, threads=1).encode(patches, rows, columns)
    found = np.asarray(loaded(device).encode(patches, rows, columns))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= RELATIVE_ERROR * np.abs(wanted).max()


def test_the_cache_is_one_piece_of_memory_for_input_and_output(device: Device) -> None:
    backend = loaded(device)
    decoder = decoder_of(device, backend, capacity=32)
    decoder.prefill([[1, 2, 3]])
    facts = device.bundle.manifest.decoder_facts
    for name, array in backend.cache.items():
        rows = device.gpu.numpy(array).reshape(facts.num_kv_heads, 32, -1)
        assert rows[:, :3].any(axis=-1).all() and not rows[:, 3:].any(), name
    before = device.gpu.allocated_bytes
    decoder.prefill([[4, 5, 6]])
    assert device.gpu.allocated_bytes == before, "a turn like the last allocates nothing"
    token_bytes = sum(array.nbytes for array in backend.cache.values()) // 32
    assert token_bytes == device.bundle.manifest.kv_bytes_per_token


def test_a_step_like_the_last_binds_nothing_anew(device: Device) -> None:
    decoder = decoder_of(device, loaded(device), capacity=32)
    decoder.prefill([[1, 2, 3]])
    decoder.decode_step(4)
    device.world.calls.clear()
    decoder.decode_step(5)
    assert not device.world.calls.named("set_tensor_address")
    decoder.prefill([[6, 7]])
    assert device.world.calls.named("set_tensor_address")


def test_engines_are_built_at_the_first_start_and_people_are_told(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "TensorRTBackend", TensorRTBackend)
    TensorRTBackend(device.bundle, engines=device.folder / "engines")
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("this takes minutes") == 2
    TensorRTBackend(device.bundle, engines=device.folder / "engines")
    assert capsys.readouterr().err == ""
    assert len(device.world.calls.named("build_serialized_network")) == 2


def test_the_backend_is_chosen_by_name_and_its_window_slides(
    device: Device, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evicts_in_place("tensorrt", device.bundle)
    backend = load_backend("tensorrt", device.bundle)  # which its stored turns are checked with
    assert isinstance(backend, TensorRTBackend)
    assert backend.placement["decoder"] == "Orin (SM 8.7), TensorRT 10.3.0"
    assert backend.identity["tensorrt"] == "10.3.0" and backend.identity["sm"] == "87"
    assert (bundle.with_name("bundle.engines") / "decoder.sm87.trt10.3.0.engine").is_file()


def change_plugin(device: Device) -> str:
    Path(os.environ[PLUGIN_VARIABLE]).write_bytes(b"another build of it")
    return "with a plugin with hash"


def change_native_library(device: Device) -> str:
    library = device.folder / "libstreamo_kernels.so"
    library.write_bytes(b"another version of it")
    device.monkeypatch.setattr("edge.kernels_abi.library_path", lambda: library)
    return "with a plugin with hash"


def change_tensorrt(device: Device) -> str:
    device.install("10.13.2.6")
    return "There is none yet"  # under its own name


def change_patch_of_tensorrt(device: Device) -> str:
    for path in (device.folder / "engines").iterdir():  # as if the name did not have it
        path.rename(path.with_name(path.name.replace("10.3.0", "10.3.1")))
    device.install("10.3.1")
    return "with TensorRT 10.3.0, expected with TensorRT 10.3.1"


def change_sm(device: Device) -> str:
    device.gpu.sm = device.world.sm = 89
    return "There is none yet"


def change_gpu(device: Device) -> str:
    device.gpu.name = "Orin Nano"
    return "on Orin, expected on Orin Nano"


def change_bundle(device: Device) -> str:
    manifest = device.bundle.manifest
    files = dict(manifest.files)
    for name in (contract.TENSORRT_VISION_FILE, contract.TENSORRT_DECODER_FILE):
        files[name] = replace(files[name], sha256="1" * 64)
    device.bundle = replace(device.bundle, manifest=replace(manifest, files=files))
    return "from files with hash"


def damage(device: Device) -> str:
    for path in (device.folder / "engines").glob("*.engine"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    return "is damaged: expected sha256"


CHANGES = [
    change_plugin, change_native_library, change_tensorrt, change_patch_of_tensorrt, change_sm, change_gpu,
    change_bundle, damage,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_engines_of_something_else_are_built_again_at_the_start_and_never_given_to_tensorrt(
    device: Device, change: Callable[[Device], str]
) -> None:
    loaded(device)
    reason = change(device)
    device.world.calls.clear()
    device.world.mark = reason
    heard = Heard()
    TensorRTBackend(device.bundle, listener=heard.listener, engines=device.folder / "engines")
    assert len(heard.sentences) == 2 and all(reason in sentence for sentence in heard.sentences)
    assert len(device.world.calls.named("build_serialized_network")) == 2
    given = device.world.calls.named("deserialize_cuda_engine")
    assert [json.loads(plan)["mark"] for (plan,) in given] == [reason, reason]
    device.world.calls.clear()
    loaded(device)
    assert not device.world.calls.named("build_serialized_network")


def test_an_engine_that_tensorrt_refuses_after_all_is_one_error(device: Device) -> None:
    device.world.built_version = "10.3.1"
    with pytest.raises(EngineError, match=r"cannot load the vision engine .*: Version tag does not match") as caught:
        loaded(device)
    assert caught.value.hint == "Run `streamo-edge build BUNDLE --force`"


def test_too_little_memory_for_intermediate_results_is_told_with_numbers(device: Device) -> None:
    device.world.activation_bytes = 9 << 30
    with pytest.raises(MemoryBudgetError, match=r"takes 9\.7 GB of GPU memory for .*, 8\.6 GB is free"):
        loaded(device)


def test_a_cache_that_does_not_fit_is_refused_with_numbers(device: Device) -> None:
    backend = loaded(device)
    with pytest.raises(MemoryBudgetError, match=f"at most {MOST_CACHED_TOKENS} tokens, {MOST_CACHED_TOKENS + 1} are"):
        backend.allocate_cache(MOST_CACHED_TOKENS + 1)
    device.gpu.free_bytes = 1000
    with pytest.raises(MemoryBudgetError, match=r"layers x 64 tokens, 1\.0 kB of GPU memory is free"):
        backend.allocate_cache(64)


def test_a_failing_engine_gives_tensorrts_reason(device: Device) -> None:
    decoder = decoder_of(device, loaded(device))
    device.world.fail_execution = "StreamoTableAttention: slots are not below the capacity"
    with pytest.raises(BackendError, match="The decoder engine failed: StreamoTableAttention: slots are not below"):
        decoder.prefill([[1, 2]])


def test_a_lost_device_ends_the_process(device: Device) -> None:
    decoder = decoder_of(device, loaded(device))
    device.world.fail_execution, device.gpu.lost = "illegal address", True
    with pytest.raises(DeviceLostError) as caught:
        decoder.prefill([[1, 2]])
    assert caught.value.exit_code == 70
    alive = weakref.ref(decoder._backend)
    del decoder, caught
    gc.collect()
    assert alive() is not None, "what lies on a lost device is not given back"


def test_a_window_of_too_many_stretches_is_refused_with_both_numbers(device: Device) -> None:
    backend = loaded(device)
    backend.allocate_cache(2048)
    facts = device.bundle.manifest.decoder_facts
    half = facts.head_dim // 2
    count = contract.MOST_SPANS + 1
    spans = np.array([(2 * i, 1, 0) for i in range(count)], np.int32)
    ones, zeros = np.ones((1, half), np.float32), np.zeros((1, half), np.float32)
    view = CacheView(np.array([2047], np.int32), spans, ones, zeros)
    embeds = np.zeros((1, facts.hidden_size), np.float32)
    with pytest.raises(BackendError, match=f"consists of {count} stretches, the TensorRT engine takes {count - 1}"):
        backend.run_decoder(embeds, ones, zeros, view)


def test_the_longest_prompt_and_the_fullest_cache_are_in_the_profiles(device: Device) -> None:
    decoder = decoder_of(device, loaded(device), capacity=700)
    decoder.prefill([[1 + i % 200 for i in range(600)]])  # in two parts, the first as long as it gets
    shapes = [found for name, _, found in device.world.executions if name == contract.TENSORRT_DECODER_FILE]
    assert [shape[contract.INPUTS_EMBEDS][0] for shape in shapes] == [512, 88]
    assert decoder.kv_cache.mark() == CacheMark(600, 600)

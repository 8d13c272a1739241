"""TensorRT engines: how they are built, kept, checked and built again. TensorRT is `fake_tensorrt`'s."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_world import Device, Heard, make_device, small_bundle
from fake_tensorrt import DELAY_VARIABLE, VERSIONS

from edge import contract
from edge.bundle import open_bundle
from edge.engines import engine_file, preflight
from edge.engines.engine_file import opened_engine, unusable
from edge.engines.plugin import PLUGIN_VARIABLE, find_plugin, load_plugin
from edge.engines.profiles import MOST_CACHED_TOKENS
from edge.engines.store import EngineStore
from edge.engines.toolkit import Messages, load_tensorrt
from edge.errors import EngineError, MemoryBudgetError, OutputError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def device(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from make_device(bundle, tmp_path, monkeypatch)


# Building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_decoder_is_built_with_types_as_the_graph_says_and_its_cache_in_place(device: Device, version: str) -> None:
    world, heard = device.install(version), Heard()
    stored = device.store().ensure("decoder", heard.listener)
    assert not stored.found and stored.bytes == stored.path.stat().st_size
    trt = sys.modules["tensorrt"]
    strong = 1 << 1 if world.major < 11 else 0
    assert world.calls.named("create_network") == [(strong,)]
    assert world.calls.named("set_preview_feature") == [(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)]
    assert world.calls.named("set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 512 << 20)]
    assert world.calls.named("parse_from_file") == [(str(device.bundle.file(contract.TENSORRT_DECODER_FILE)),)]
    assert "There is none yet" in heard.sentences[0] and "Orin" in heard.sentences[0]
    assert heard.steps[-1] == ("decoder: Building Engine", 4, 4), "nested phases are not told"
    assert [step for step in heard.steps if step[1] > step[2]] == []


def test_the_decoder_has_a_profile_for_one_token_and_one_for_a_turn(device: Device) -> None:
    store = device.store()
    stored = store.ensure("decoder")
    with store.opened("decoder") as content:
        token, turn = json.loads(bytes(content))["profiles"]
    facts = device.bundle.manifest.decoder_facts
    assert [shape[0] for shape in token[contract.INPUTS_EMBEDS]] == [1, 1, 1]
    assert [shape[0] for shape in turn[contract.INPUTS_EMBEDS]] == [2, 144, 512]
    assert turn[contract.INPUTS_EMBEDS][2] == [512, facts.hidden_size]
    for profile in (token, turn):
        assert profile["key_cache.0"][2] == [1, facts.num_kv_heads, MOST_CACHED_TOKENS, facts.head_dim // 4]
        assert profile["key_scales.1"][0] == [1, facts.num_kv_heads, 1]
    assert stored.path.name == "decoder.sm87.trt10.3.0.engine"


def test_the_vision_engine_takes_every_frame_that_the_bundle_takes(device: Device) -> None:
    store = device.store()
    store.ensure("vision")
    with store.opened("vision") as content:
        (frame,) = json.loads(bytes(content))["profiles"]
    most = device.bundle.manifest.max_visual_tokens * 4
    assert frame[contract.WINDOW_MASK] == [[4, 4], [most, most], [most, most]]


def test_an_engine_that_is_there_is_not_built_again(device: Device) -> None:
    first = device.store().ensure("vision")
    second = device.store().ensure("vision")
    assert second.found and second.path == first.path and second.bytes == first.bytes
    assert len(device.world.calls.named("build_serialized_network")) == 1
    forced = device.store().ensure("vision", force=True)
    assert not forced.found and len(device.world.calls.named("build_serialized_network")) == 2


def test_engines_lie_beside_the_bundle_and_never_in_it(device: Device, tmp_path: Path) -> None:
    copy = shutil.copytree(device.bundle.path, tmp_path / "place" / "bundle")
    device.bundle = open_bundle(copy)
    store = replace(device.store(), folder=None)
    names = sorted(path.name for path in copy.iterdir())
    assert store.ensure("vision").path.parent == tmp_path / "place" / "bundle.engines"
    assert sorted(path.name for path in copy.iterdir()) == names


def test_measured_times_are_kept_for_the_next_build_and_refused_ones_forgotten(device: Device) -> None:
    store, world = device.store(), device.world
    store.ensure("vision")
    store.ensure("decoder")
    assert [content for content, _ in world.calls.named("set_timing_cache")] == [b"", b"t"]
    cache = next((device.folder / "engines").glob("timing.*.cache"))
    for content, corrupt in ((b"garbage", False), (b"of another device", True)):
        cache.write_bytes(content)
        world.corrupt_timing_cache = corrupt
        world.calls.clear()
        store.ensure("vision", force=True)
        assert [found for found, _ in world.calls.named("set_timing_cache")] == [b""]


# What an engine depends on ---------------------------------------------------------------------------------------


def built_for(device: Device, change: str) -> EngineStore:
    """A store that differs from the one before in one thing, looking at the same file."""
    store = device.store()
    if change == "tensorrt":
        toolkit = replace(store.toolkit, version=(10, 13, 2))
        store = replace(store, toolkit=toolkit)
    if change == "sm":
        store = replace(store, device=replace(store.device, sm=89))
    if change == "device":
        store = replace(store, device=replace(store.device, name="Orin Nano"))
    if change == "plugin":
        store = replace(store, plugin=replace(store.plugin, sha256="0" * 64))
    if change == "options":
        store = replace(store, options=replace(store.options, optimization_level=5))
    if change == "graph":
        files = dict(store.bundle.manifest.files)
        name = contract.TENSORRT_DECODER_FILE
        files[name] = replace(files[name], sha256="1" * 64)
        manifest = replace(store.bundle.manifest, files=files)
        store = replace(store, bundle=replace(store.bundle, manifest=manifest))
    return store


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tensorrt", "with TensorRT 10.3.0, expected with TensorRT 10.13.2"),
        ("sm", "for SM 87, expected for SM 89"),
        ("device", "on Orin, expected on Orin Nano"),
        ("plugin", "expected with a plugin with hash 000000000000"),
        ("options", "for sizes with hash"),
        ("graph", "from files with hash"),
    ],
)
def test_an_engine_of_something_else_is_refused_unread_and_built_again(
    device: Device, change: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = device.store().ensure("decoder").path
    other = built_for(device, change)
    monkeypatch.setattr(EngineStore, "path", lambda self, component: path)
    with pytest.raises(EngineError, match=said), other.opened("decoder"):
        raise AssertionError("it was opened")
    heard = Heard()
    again = other.ensure("decoder", heard.listener)
    assert not again.found and said in again.reason and said in heard.sentences[0]
    assert other.ensure("decoder").found


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], r"\d+ bytes, found \d+"),
        (lambda content: content + b"x", r"\d+ bytes, found \d+"),
        (lambda content: content[:20], "starts with STREAMO-ENGINE-1"),
        (lambda content: content[:40], "a header that says what it was built for"),
        (lambda content: b"", "starts with STREAMO-ENGINE-1"),
        (lambda content: b"ftrt" + content[4:], "starts with STREAMO-ENGINE-1"),
        (lambda content: content[:17] + b"\xff\xff\xff\xff" + content[21:], "starts with STREAMO-ENGINE-1"),
        (lambda content: content[:21] + b"[]" + content[23:], "a header that says what it was built for"),
        (lambda content: content[:-5] + b"\x00" + content[-4:], r"sha256 \w{12}, found \w{12}"),
    ],
)
def test_a_damaged_engine_is_refused_before_tensorrt_sees_it(device: Device, damage: Any, said: str) -> None:
    store = device.store()
    path = store.ensure("vision").path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EngineError, match=f"is damaged: expected .*{said}"), store.opened("vision"):
        raise AssertionError("it was opened")
    hidden = "sha256" in said  # it takes reading all of it
    assert store.ensure("vision").found == hidden and store.ensure("vision", whole=True).found != hidden
    assert store.ensure("vision", whole=True).found


def test_a_missing_engine_says_how_to_build_it(device: Device, tmp_path: Path) -> None:
    store = device.store()
    with pytest.raises(EngineError, match="is not there") as caught, opened_engine(tmp_path / "a", store.key("vision")):
        pass
    assert caught.value.hint == "Run `streamo-edge build BUNDLE`"


# Several builders, and killed ones --------------------------------------------------------------------------------


def build_in_child(device: Device, delay_s: float, results: Any) -> None:
    os.environ[DELAY_VARIABLE] = str(delay_s)
    heard = Heard()
    stored = device.store().ensure("decoder", heard.listener)
    results.put((stored.found, len(device.world.calls.named("build_serialized_network")), heard.sentences))


def test_of_two_builders_at_once_one_builds_and_the_other_waits_and_finds(device: Device) -> None:
    results = FORK.Queue()
    children = [FORK.Process(target=build_in_child, args=(device, 0.6, results)) for _ in range(2)]
    for child in children:
        child.start()
    outcomes = sorted(results.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    (built, built_calls, _), (found, found_calls, sentences) = outcomes
    assert (built, built_calls) == (False, 1) and (found, found_calls) == (True, 0)
    assert sentences == ["Another process builds the decoder engine: waiting for it"]
    assert device.store().ensure("decoder").found


def test_a_build_that_is_killed_leaves_nothing_that_loads_and_no_lock(device: Device) -> None:
    store = device.store()
    child = FORK.Process(target=build_in_child, args=(device, 60, FORK.Queue()))
    child.start()
    folder = device.folder / "engines"
    deadline = time.monotonic() + 30
    while not list(folder.glob(".*.lock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not list(folder.glob("*.engine")) and unusable(store.path("decoder"), store.key("decoder")) is not None
    assert not store.ensure("decoder").found and store.ensure("decoder").found


def test_what_a_builder_killed_while_writing_left_is_removed_and_never_loaded(device: Device) -> None:
    store, path = device.store(), device.store().path("decoder")
    path.parent.mkdir(parents=True)
    left = path.with_name(f".{path.name}.4711.partial")
    left.write_bytes(b"STREAMO-ENGINE-1\nhalf of it")
    other = path.with_name(".vision.engine.4712.partial")
    other.write_bytes(b"somebody is writing this")
    assert store.ensure("decoder").path == path
    assert not left.exists() and other.exists()


def test_ctrl_c_during_a_build_ends_it_and_leaves_nothing(device: Device) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    listener = replace(Heard().listener, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        device.store().ensure("decoder", listener)
    assert not list((device.folder / "engines").glob("*.engine"))
    assert not device.store().ensure("decoder").found


def test_a_full_disk_is_told_and_leaves_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_file.os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        device.store().ensure("decoder")
    assert not [path for path in (device.folder / "engines").iterdir() if path.suffix in (".engine", ".partial")]


# What is missing or does not fit ------------------------------------------------------------------------------------


def test_no_tensorrt_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"^TensorRT (is not installed|cannot be loaded)") as caught:
        device.store()
    assert caught.value.exit_code == 3 and "apt install python3-libnvinfer" in str(caught.value.hint)


@pytest.mark.parametrize("version", ["8.5.2.2", "10.1.0", "12.0.1"])
def test_another_version_of_tensorrt_names_both(device: Device, version: str) -> None:
    device.install(version)
    with pytest.raises(EngineError, match=rf"should be 10\.3 to 11\.x, found {version}"):
        device.store()


def test_a_module_without_a_version_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "dev")
    with pytest.raises(EngineError, match="version 'dev', expected a number"):
        load_tensorrt()


def test_a_plugin_that_was_not_built_says_how_to(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGIN_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(device.folder / "cache"))
    with pytest.raises(
        EngineError, match=r"not built for TensorRT 10\.3\.0: expected `.*libstreamo_tensorrt"
    ) as caught:
        device.store()
    assert caught.value.hint == "Run `streamo-edge build-plugin`"


def test_a_plugin_for_another_tensorrt_is_refused(device: Device) -> None:
    device.install("10.13.2.6")
    toolkit = replace(load_tensorrt(), version=(11, 4, 0))
    with pytest.raises(EngineError, match=r"built for TensorRT 10\.13, expected 11\.4\.0"):
        find_plugin(toolkit)


def test_a_plugin_that_tensorrt_does_not_take_is_one_error(device: Device) -> None:
    toolkit = load_tensorrt()
    with pytest.raises(EngineError, match="does not load the plugin"):
        load_plugin(toolkit, replace(find_plugin(toolkit), path=device.folder / "gone.so"))


def test_nodes_that_the_parser_refuses_are_listed(device: Device) -> None:
    device.world.refused = {"DequantizeLinear", "StreamoTableAttention"}
    with pytest.raises(EngineError) as caught:
        device.store().ensure("decoder")
    said = caught.value.message
    assert "TensorRT 10.3.0 cannot read `decoder.tensorrt.onnx`: " in said
    assert "DequantizeLinear `layers.0/attention/DequantizeLinear`: No importer registered for this op" in said
    assert said.count("StreamoTableAttention `") >= 1 and said.endswith("and 3 more")
    assert not list((device.folder / "engines").glob("*.engine"))


def test_a_build_without_memory_is_a_memory_error_with_tensorrts_words(device: Device) -> None:
    device.world.build_error = "Requested size was 123 bytes.\n  OutOfMemory (Could not allocate)"
    with pytest.raises(MemoryBudgetError, match=r"out of memory while building .*: Requested size was 123") as caught:
        device.store().ensure("decoder")
    assert caught.value.exit_code == 5


def test_a_build_that_fails_gives_tensorrts_reason(device: Device) -> None:
    refused = "StreamoTableAttention: attention on a GPU has kernels for a head_dim of 64 and 128, found 32"
    for said in ("Could not find any implementation for node layers.0/mlp", refused):
        device.world.build_error = said
        with pytest.raises(EngineError, match=rf"cannot build an engine of .*: {said}"):
            device.store().ensure("decoder")


def test_a_workspace_that_is_too_small_is_hinted_at(device: Device) -> None:
    device.world.build_error = "Skipping tactic 0 due to insufficient workspace size: 99 requested, 9 available"
    with pytest.raises(EngineError, match="insufficient workspace size") as caught:
        device.store().ensure("decoder")
    assert caught.value.hint == "Build with a larger `--workspace-mib`"


def test_what_the_plugin_refuses_is_told_though_tensorrts_log_does_not_have_it(device: Device) -> None:
    store = device.store()
    device.world.refusal = (
        "StreamoTableAttention: attention on a GPU has kernels for a head_dim of 64 and 128, found 32"
    )
    with pytest.raises(EngineError, match=r"found 32; Plugin layer failed to configure$"):
        store.ensure("decoder")


def test_a_tensorrt_that_does_not_start_is_one_error(device: Device) -> None:
    store = device.store()
    store.ensure("vision")
    device.world.no_builder = True
    with pytest.raises(EngineError, match=r"^TensorRT 10\.3\.0 does not start: CUDA initialization failure .* 35$"):
        store.ensure("decoder")


def test_ctrl_c_anywhere_in_a_build_ends_it(device: Device) -> None:
    device.world.interrupted_by_signal = True
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        device.store().ensure("decoder")
    assert signal.getsignal(signal.SIGINT) is before
    assert not list((device.folder / "engines").glob("*.engine"))


def test_another_thread_may_build(device: Device) -> None:
    store = device.store()
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(store.ensure, "vision").result().found


def test_of_many_messages_the_cause_and_the_end_are_told() -> None:
    messages = Messages()
    for text in ("StreamoMatMul: the block is too long", *(f"message {i}" for i in range(9)), "the build ends"):
        messages.add(text)
    said = messages.told()
    assert said.startswith("StreamoMatMul: the block is too long; message 0;") and said.endswith("the build ends")
    assert said.count(";") == 5 and messages.told() == "TensorRT gave no reason"


def test_too_little_memory_is_told_before_the_build_with_both_numbers(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.gpu.free_bytes = 1 << 30
    with pytest.raises(MemoryBudgetError, match=r"takes about 2\.\d GB of memory, 1\.1 GB is free"):
        device.store().ensure("decoder")
    assert not device.world.calls.named("build_serialized_network")
    assert not device.store(ignore_memory=True).ensure("decoder").found

    monkeypatch.setattr(preflight, "available_bytes", lambda: 64 << 30)
    device.gpu.integrated = False
    with pytest.raises(MemoryBudgetError, match=r"takes about 1\.1 GB of GPU memory, 1\.0 GB is free"):
        device.gpu.free_bytes = 10**9
        device.store().ensure("vision")


def test_too_little_disk_is_told_before_the_build(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(OutputError, match=r"takes about 67\.\d MB, .* has 1\.0 MB free"):
        device.store().ensure("decoder")


def test_a_bundle_without_tensorrt_graphs_says_so(device: Device) -> None:
    manifest = device.bundle.manifest
    device.bundle = replace(
        device.bundle, manifest=replace(manifest, decoder=replace(manifest.decoder, tensorrt_file=""))
    )
    with pytest.raises(EngineError, match="no TensorRT graph of its decoder"):
        device.store()

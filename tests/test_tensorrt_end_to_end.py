"""A conversation through the TensorRT backend, its plugin and the GPU kernels, without TensorRT and without a GPU.

What is real: the exported graphs, the engines' profiles and memory, the plugin's C++ (compiled with the stand-in
header), the launcher and the kernels, which Triton's interpreter runs. What is not: TensorRT's own layers, which onnx's
evaluator computes in float16.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from engine_world import Heard, install_tensorrt
from gpu_interpreter import FakeCuda, aligned_array, needs_compiler, needs_triton
from kernel_cases import needs_kernels
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from test_gpu_frame import nv12, picture
from test_tensorrt_plugin import COMPILER, PLUGIN, STANDIN, Node, declare, has_gpu_products
from tiny_checkpoint import write_checkpoint, write_preprocessor

from edge import contract
from edge.backends.ort import OrtBackend
from edge.backends.tensorrt import TensorRTBackend
from edge.bundle import Bundle, open_bundle
from edge.decoder import MAX_PREFILL_TOKENS, Decoder
from edge.device_frames import Nv12Frame
from edge.engines.builder import BuildOptions
from edge.engines.profiles import MOST_CACHED_TOKENS, MOST_RUNS
from edge.gpu import Gpu
from edge.kernels_abi import library_path
from edge.sampling import Sampler, Sampling
from edge.session import StreamSession
from edge.vision import VisionEncoder

pytestmark = [
    needs_kernels,
    needs_triton,
    needs_compiler,
    pytest.mark.skipif(not has_gpu_products(), reason="the native library was built without the GPU launcher"),
]
ROOT = STANDIN.parent.parent


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCuda]:
    fake = FakeCuda(tmp_path_factory.mktemp("driver"))
    with fake.in_use():
        yield fake


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory, cuda: FakeCuda) -> Any:
    """The plugin over the real launcher, with what calls it as TensorRT would."""
    path, kernels = tmp_path_factory.mktemp("plugin") / "libplugin.so", library_path()
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{STANDIN}", f"-I{ROOT / 'kernels' / 'include'}"]
    command += [str(PLUGIN), str(STANDIN / "host.cpp"), "-o", str(path), str(kernels), f"-Wl,-rpath,{kernels.parent}"]
    subprocess.run([*command, "-ldl"], check=True)
    return declare(ctypes.CDLL(str(path)))


def operators_of(library: Any, cuda: FakeCuda) -> list[type[OpRun]]:
    """The plugin's operators for onnx's evaluator: each node made, written to an engine, read again and called.

    The kernels are held to the arrays of a call, and to scratch memory of the size that the plugin asks for.
    """

    def call(op: str, inputs: list[np.ndarray], scale: float, attributes: dict[str, Any]) -> list[np.ndarray]:
        numbers = {name: value for name, value in attributes.items() if isinstance(value, int)}
        node = Node(library, op, scale, **numbers).reloaded()
        shapes = [values.shape for values in inputs]
        assert node.takes(shapes), library.standin_messages()
        given = [aligned_array(np.asarray(values)) for values in inputs]
        results = []
        for shape, kind, alias in node.outputs(shapes):
            dtype = {0: np.float32, 3: np.int32}[kind]
            results.append(aligned_array(np.full(shape, 85, dtype)) if alias < 0 else given[alias])
        scratch = aligned_array(np.empty(node.workspace(shapes), np.uint8))
        cuda.host_arrays = [*given, *results, scratch]
        status = node.enqueue(
            shapes, [v.ctypes.data for v in given], [v.ctypes.data for v in results], scratch.ctypes.data, 0
        )
        assert status == 0, library.standin_messages()
        return results

    class StreamoTableAttention(OpRun):
        op_domain = contract.CUSTOM_DOMAIN

        def _run(self, *inputs: Any, scale: float, **attributes: Any) -> tuple[np.ndarray, ...]:
            return tuple(call(contract.TABLE_ATTENTION, list(inputs), scale, attributes))

    class StreamoMatMul(OpRun):
        op_domain = contract.CUSTOM_DOMAIN

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[np.ndarray, ...]:
            return tuple(call(contract.PLUGIN_MATMUL, list(inputs), 0.0, attributes))

    return [StreamoTableAttention, StreamoMatMul]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Key biases that need an offset, and weights of which TensorRT multiplies with some and the plugin with others."""
    from export.api import export_checkpoint, record_reference

    folder = tmp_path_factory.mktemp("tiny")
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64, "vision_depth": 2, "vision_hidden": 64, "vision_heads": 2}
    write_checkpoint(folder / "checkpoint", key_bias_norm=605, intermediate_size=128, **shape)
    write_preprocessor(folder / "checkpoint", max_pixels=28 * 28 * 6)
    record_reference(folder / "checkpoint", folder / "reference.npz")
    options = {"weights": "int4", "block_size": 64, "reference": folder / "reference.npz", "allow_mismatch": True}
    export_checkpoint(folder / "checkpoint", folder / "bundle", **options)
    return open_bundle(folder / "bundle")


@pytest.fixture
def evaluated(plugin: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines run in onnx's evaluator, with the plugin's operators."""
    operators = operators_of(plugin, cuda)
    monkeypatch.setattr(fake_tensorrt, "tensorrt_graph", lambda path: ReferenceEvaluator(str(path), new_ops=operators))


def talk(bundle: Bundle, backend: Any) -> list[np.ndarray]:
    """A prompt, a reply, a turn cut out of the middle, and more."""
    decoder = Decoder(bundle.manifest, bundle.file(bundle.manifest.embedding.file), backend, 96)
    found = [np.array(decoder.prefill([list(range(9))]))]
    start = decoder.kv_cache.mark()
    found += [np.array(decoder.prefill([[30, 31, 32, 33]])), np.array(decoder.decode_step(3))]
    decoder.kv_cache.evict(start, decoder.kv_cache.mark())
    return [*found, np.array(decoder.prefill([[40, 41, 42]]))]


def test_a_conversation_through_plugin_launcher_and_kernels_has_nearly_the_cpus_logits(
    bundle: Bundle, cuda: FakeCuda, evaluated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bundle.manifest.key_offset_layers and "int8" in bundle.manifest.kv_dtypes
    world = install_tensorrt("10.3.0", tmp_path, monkeypatch)
    backend = TensorRTBackend(bundle, listener=Heard().listener, engines=tmp_path / "engines")
    on_device = talk(bundle, backend)
    cuda.host_arrays = []
    assert Sampler(Sampling()).choose(backend._place.logits(backend._logits)) == int(np.argmax(on_device[-1]))
    cuda.check()
    for found, expected in zip(on_device, talk(bundle, OrtBackend(bundle, threads=1)), strict=True):
        assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected)
    assert [profile for name, profile, _ in world.executions if "decoder" in name] == [1, 1, 0, 1]
    kinds = {name.split("_")[0] for name, _ in cuda.launched}
    assert {"append", "attend", "merge", "sample"} <= kinds and len(kinds) > 4, kinds


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (28, 4)], ids=["3B", "7B"])
@pytest.mark.parametrize("int8", [0, 1])
def test_the_plugins_scratch_memory_fits_into_the_workspace_that_builds_have_by_default(
    cuda: FakeCuda, plugin: Any, heads: int, kv_heads: int, int8: int
) -> None:
    width, tokens, runs, capacity = 128, MAX_PREFILL_TOKENS, MOST_RUNS, MOST_CACHED_TOKENS
    qkv, half, row = (heads + 2 * kv_heads) * width, width // 2, width // 4 if int8 else width
    cache = (1, kv_heads, capacity, row)
    shapes: list[tuple[int, ...]] = [(tokens, qkv), (qkv,), (tokens, half), (tokens, half), cache, cache, (9999,)]
    shapes += [(runs, half), (runs, half), *[(1, kv_heads, capacity)] * (2 * int8)]
    shapes += [(kv_heads, width), (capacity, half), (capacity, half)] * int8
    numbers = {"num_heads": heads, "num_kv_heads": kv_heads, "int8_cache": int8, "key_offset": int8, "most_spans": 256}
    node = Node(plugin, contract.TABLE_ATTENTION, building=True, **numbers)
    assert node.takes(shapes), plugin.standin_messages()
    assert 64 << 20 < node.workspace(shapes) <= BuildOptions().workspace_bytes


def visual_tokens(encoder: VisionEncoder, frame: Any) -> np.ndarray:
    resized = encoder.resize(frame)
    return np.array(encoder.encode(resized, encoder.patches(resized)).embeds)


def test_a_frame_on_the_gpu_gives_the_engine_what_the_cpus_preprocessing_gives(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt("10.3.0", tmp_path, monkeypatch)
    backend = TensorRTBackend(bundle, listener=Heard().listener, engines=tmp_path / "engines")
    encoder, frame = VisionEncoder(bundle.manifest, backend), picture(96, 128)
    expected = visual_tokens(encoder, frame)
    cuda.launched.clear()
    monkeypatch.setattr("edge.vision.patchify", None)
    with Gpu() as gpu:
        np.testing.assert_array_equal(visual_tokens(encoder, gpu.array(frame)), expected)
    assert [name for name, _ in cuda.launched][:2] == ["frame_columns_rgb", "frame_patches"]


@pytest.mark.parametrize("pairs", [False, True])
def test_an_nv12_frame_on_the_gpu_gives_nearly_what_its_rgb_gives(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: bool
) -> None:
    cv2 = pytest.importorskip("cv2")
    install_tensorrt("10.3.0", tmp_path, monkeypatch)
    backend = TensorRTBackend(bundle, listener=Heard().listener, engines=tmp_path / "engines")
    encoder, (luma, chroma) = VisionEncoder(bundle.manifest, backend), nv12(96, 128)
    expected = visual_tokens(encoder, cv2.cvtColorTwoPlane(luma, chroma, cv2.COLOR_YUV2RGB_NV12))
    with Gpu() as gpu:
        planes = gpu.array(luma), gpu.array(chroma if pairs else chroma.reshape(48, 128))
        found = visual_tokens(encoder, Nv12Frame(*planes))
        other = visual_tokens(encoder, Nv12Frame(*planes, full_range=True, bt709=True))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.02 and np.linalg.norm(other - expected) > 2 * error * np.linalg.norm(expected)


@pytest.mark.slow  # the system prompt is long for an interpreter
def test_a_session_decides_the_same_of_a_frame_on_the_gpu(
    bundle: Bundle, cuda: FakeCuda, evaluated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt("10.3.0", tmp_path, monkeypatch)
    backend = TensorRTBackend(bundle, listener=Heard().listener, engines=tmp_path / "engines")
    frame, turns = picture(96, 128), []
    with Gpu() as gpu:
        for pixels in (frame, gpu.array(frame)):
            session = StreamSession(bundle, backend=backend, window_turns=2, max_reply_tokens=2)
            session.ask("?")
            cuda.launched.clear()
            turns.append(session.push(pixels, 0))
    assert (turns[0].state, turns[0].text) == (turns[1].state, turns[1].text)
    np.testing.assert_array_equal(np.array(turns[0].logits), np.array(turns[1].logits))
    assert {"frame", "append", "attend"} <= {name.split("_")[0] for name, _ in cuda.launched}

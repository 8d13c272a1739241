"""The TensorRT plugin, compiled with a stand-in for TensorRT's headers and called as TensorRT calls it.

What it hands to the GPU kernels is recorded; the kernels themselves are tested elsewhere. That the plugin also compiles
with TensorRT's own headers is checked where they are: see docs/verification.md.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import needs_kernels

from edge import contract, kernels_abi
from edge.engines import plugin, plugin_build
from edge.engines.plugin import built_path, find_plugin
from edge.engines.plugin_build import build_plugin, plan_build
from edge.engines.toolkit import TensorRT
from edge.errors import EngineError
from edge.kernels_abi import AttentionArguments, MatmulArguments, WeightsSource

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "tests" / "tensorrt_standin"
PLUGIN = ROOT / "kernels" / "adapters" / "tensorrt" / "plugin.cpp"
COMPILER = shutil.which("c++") or shutil.which("g++")
FLOAT, HALF, INT8, INT32 = range(4)
HEADS, KV_HEADS, WIDTH, TOKENS, CAPACITY, RUNS, WORDS = 8, 2, 64, 3, 128, 2, 40

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "libplugin.so"
    sources = [PLUGIN, STANDIN / "host.cpp", STANDIN / "recorder.cpp"]
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{STANDIN}", f"-I{ROOT / 'kernels' / 'include'}", *map(str, sources), "-o", str(path), "-ldl"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def library(built: Path) -> Any:
    return declare(ctypes.CDLL(str(built)))


def declare(loaded: Any) -> Any:
    """Say what the host's functions return."""
    for name in ("standin_create", "standin_reload"):
        getattr(loaded, name).restype = ctypes.c_void_p
    for name in ("standin_messages", "standin_fields", "streamo_tensorrt_messages"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.standin_workspace.restype = ctypes.c_size_t
    return loaded


class Node:
    """One plugin of a graph."""

    def __init__(
        self, library: Any, op: str, scale: float = 0.125, *, building: bool = False, wide: bool = False, **values: int
    ) -> None:
        self.library, self.op = library, op
        names = (ctypes.c_char_p * len(values))(*(name.encode() for name in values))
        numbers = (ctypes.c_int32 * len(values))(*values.values())
        self.pointer = ctypes.c_void_p(
            library.standin_create(
                op.encode(), names, numbers, len(values), ctypes.c_float(scale), int(building), int(wide)
            )
        )

    def reloaded(self) -> Node:
        """Written to an engine, read from it, and bound to a context."""
        other = object.__new__(Node)
        other.library, other.op = self.library, self.op
        other.pointer = ctypes.c_void_p(self.library.standin_reload(self.pointer))
        return other

    def outputs(self, shapes: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], int, int]]:
        """Shape, type and aliased input of each output."""
        found, types, aliases = (ctypes.c_int64 * 64)(), (ctypes.c_int32 * 8)(), (ctypes.c_int32 * 8)()
        count = self.library.standin_outputs(self.pointer, table(shapes), len(shapes), found, types, aliases)
        rows = np.array(found).reshape(8, 8)
        return [(tuple(rows[i, 1 : 1 + rows[i, 0]].tolist()), types[i], aliases[i]) for i in range(count)]

    def takes(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether a profile with sizes of at most these may be built."""
        return not self.library.standin_configure(self.pointer, table(shapes), len(shapes))

    def workspace(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of scratch memory for sizes of at most these."""
        return int(self.library.standin_workspace(self.pointer, table(shapes), len(shapes)))

    def enqueue(
        self,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int = 4096,
        stream: int = 17,
    ) -> int:
        pointers = [(ctypes.c_void_p * len(values))(*values) for values in (inputs, outputs)]
        return int(
            self.library.standin_enqueue(
                self.pointer, table(shapes), len(shapes), *pointers, ctypes.c_void_p(workspace), ctypes.c_void_p(stream)
            )
        )


def table(shapes: Sequence[Sequence[int]]) -> Any:
    """Eight numbers for each shape: its rank, and its sizes."""
    rows = [[len(shape), *shape, *[0] * (7 - len(shape))] for shape in shapes]
    return (ctypes.c_int64 * (8 * len(rows)))(*(n for row in rows for n in row))


def attention_shapes(int8: bool, offset: bool) -> list[tuple[int, ...]]:
    half = WIDTH // 2
    cache = (1, KV_HEADS, CAPACITY, WIDTH // 4 if int8 else WIDTH)
    shapes: list[tuple[int, ...]] = [
        (TOKENS, (HEADS + 2 * KV_HEADS) * WIDTH), ((HEADS + 2 * KV_HEADS) * WIDTH,), (TOKENS, half), (TOKENS, half),
        cache, cache, (WORDS,), (RUNS, half), (RUNS, half),
    ]  # fmt: skip
    shapes += [(1, KV_HEADS, CAPACITY)] * 2 if int8 else []
    return shapes + ([(KV_HEADS, WIDTH), (CAPACITY, half), (CAPACITY, half)] if offset else [])


def attention(library: Any, int8: bool, offset: bool, **options: Any) -> Node:
    values = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "int8_cache": int(int8), "key_offset": int(offset)}
    return Node(library, contract.TABLE_ATTENTION, **values, most_spans=77, **options)


KINDS = [(False, False), (True, False), (True, True)]


def test_the_plugin_offers_both_operators_with_the_attributes_that_graphs_have(library: Any) -> None:
    fields = {op: set(library.standin_fields(op.encode()).decode().split()) for op in
              (contract.TABLE_ATTENTION, contract.PLUGIN_MATMUL)}  # fmt: skip
    assert fields[contract.TABLE_ATTENTION] == {
        "num_heads", "num_kv_heads", "int8_cache", "key_offset", "most_spans", "scale",
    }  # fmt: skip
    assert fields[contract.PLUGIN_MATMUL] == {"bits", "block_size", "gated", "bias", "residual"}
    assert library.streamo_tensorrt_version() == 100300


@pytest.mark.parametrize(("int8", "offset"), KINDS)
def test_outputs_have_the_contracts_shapes_and_caches_are_aliased(library: Any, int8: bool, offset: bool) -> None:
    shapes = attention_shapes(int8, offset)
    found = attention(library, int8, offset).outputs(shapes)
    cache = INT32 if int8 else FLOAT
    wanted = [((TOKENS, HEADS * WIDTH), FLOAT, -1), (shapes[4], cache, 4), (shapes[5], cache, 5)]
    wanted += [(shapes[9], FLOAT, 9), (shapes[10], FLOAT, 10)] if int8 else []
    assert found == wanted


@pytest.mark.parametrize(("int8", "offset"), KINDS)
def test_every_tensor_has_one_type_and_is_linear(library: Any, int8: bool, offset: bool) -> None:
    node, inputs, outputs = attention(library, int8, offset), len(attention_shapes(int8, offset)), 5 if int8 else 3
    words = {6, 4, 5, inputs + 1, inputs + 2} if int8 else {6}
    for position in range(inputs + outputs):
        taken = [
            kind for kind in (FLOAT, HALF, INT8, INT32)
            if library.standin_supports(node.pointer, position, inputs, outputs, kind, 1)
        ]  # fmt: skip
        assert taken == [INT32 if position in words else FLOAT], position
        assert not library.standin_supports(node.pointer, position, inputs, outputs, taken[0], 0)


@pytest.mark.parametrize(("int8", "offset"), KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_step_reaches_the_kernels_with_every_pointer_in_its_place(
    library: Any, int8: bool, offset: bool, wide: bool
) -> None:
    node = attention(library, int8, offset, wide=wide).reloaded()
    shapes = attention_shapes(int8, offset)
    inputs = [0x1000 * (i + 1) for i in range(len(shapes))]
    outputs = [0x90000, inputs[4], inputs[5], *(inputs[9:11] if int8 else [])]
    assert node.enqueue(shapes, inputs, outputs) == 0, library.standin_messages()
    step = AttentionArguments.in_dll(library, "recorded_attention")
    assert (step.query_heads, step.kv_heads, step.head_dim, step.capacity) == (HEADS, KV_HEADS, WIDTH, CAPACITY)
    assert (step.new_tokens, step.run_count, step.kv_type) == (TOKENS, RUNS, int(int8))
    assert step.scale == 0.125
    assert [step.qkv, step.qkv_bias, step.rope_cos, step.rope_sin, step.key_cache, step.value_cache] == inputs[:6]
    assert [step.run_cos, step.run_sin] == inputs[7:9] and step.output == 0x90000
    assert ctypes.c_void_p.in_dll(library, "recorded_table").value == inputs[6]
    assert ctypes.c_int32.in_dll(library, "recorded_most_spans").value == 77
    scales = inputs[9:11] if int8 else [None, None]
    assert [step.key_scales, step.value_scales] == scales
    assert [step.key_offset, step.slot_cos, step.slot_sin] == (inputs[-3:] if offset else [None] * 3)
    assert ctypes.c_size_t.in_dll(library, "recorded_workspace").value == TOKENS * 1000 + CAPACITY


def test_workspace_is_enough_for_whatever_the_profile_allows(library: Any) -> None:
    shapes = attention_shapes(True, False)
    assert attention(library, True, False).workspace(shapes) == TOKENS * 2000 + CAPACITY


@pytest.mark.parametrize(("int8", "offset"), KINDS)
def test_a_profile_of_the_operators_own_sizes_is_built(library: Any, int8: bool, offset: bool) -> None:
    assert attention(library, int8, offset, building=True).takes(attention_shapes(int8, offset))
    assert library.standin_messages() == b""


@pytest.mark.parametrize(
    ("place", "sizes"),
    [
        (0, (TOKENS, 700)), (1, (700,)), (2, (TOKENS,)), (3, (TOKENS, 16)), (4, (1, KV_HEADS, CAPACITY, WIDTH)),
        (5, (2, KV_HEADS, CAPACITY, WIDTH // 4)), (6, (0,)), (7, (RUNS, 16)), (8, (RUNS,)), (10, (1, 3, CAPACITY)),
        (11, (KV_HEADS, 16)), (13, (CAPACITY, 16)),
    ],
)  # fmt: skip
def test_an_input_that_is_not_the_operators_ends_the_build(library: Any, place: int, sizes: tuple[int, ...]) -> None:
    shapes = attention_shapes(True, True)
    shapes[place] = sizes
    assert not attention(library, True, True, building=True).takes(shapes)
    said = library.standin_messages().decode()
    assert f"StreamoTableAttention: input {place} is at most ({', '.join(map(str, sizes))}), expected (" in said


def test_what_the_kernels_refuse_ends_the_build(library: Any) -> None:
    refuses = ctypes.c_int32.in_dll(library, "recorder_refuses")
    product = Node(library, contract.PLUGIN_MATMUL, bits=8, block_size=512, gated=0, bias=0, residual=0, building=True)
    refuses.value = 1
    try:
        assert not attention(library, True, False, building=True).takes(attention_shapes(True, False))
        assert library.standin_messages() == b"StreamoTableAttention: the head is too wide\n"
        assert not product.takes([(5, 512), (512 * 48 // 4,), (1, 48)])
        assert library.standin_messages() == b"StreamoMatMul: the block is too long\n"
        assert product.workspace([(5, 512), (512 * 48 // 4,), (1, 48)]) == 0
    finally:
        refuses.value = 0
    library.standin_messages()


def test_a_gpu_without_kernels_ends_the_build(built: Path, tmp_path: Path) -> None:
    other = declare(ctypes.CDLL(str(shutil.copy(built, tmp_path / "libother.so"))))  # which has opened no GPU yet
    ctypes.c_int32.in_dll(other, "recorder_has_no_gpu").value = 1
    assert not attention(other, True, False, building=True).takes(attention_shapes(True, False))
    assert other.standin_messages() == b"The GPU: no kernels for compute capability 7.2\n"


@pytest.mark.parametrize(("bits", "gated"), [(8, 0), (4, 1)])
@pytest.mark.parametrize(("bias", "residual"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_product_reaches_the_kernels_with_its_weights_and_addends(
    library: Any, bits: int, gated: int, bias: int, residual: int
) -> None:
    rows, inputs, outputs = 5, 64, 48
    width = outputs // (1 + gated)
    node = Node(library, contract.PLUGIN_MATMUL, bits=bits, block_size=32, gated=gated, bias=bias, residual=residual)
    shapes = [(rows, inputs), (inputs * outputs * bits // 32,), (2, outputs)]
    shapes += [(outputs,)] * bias + [(rows, width)] * residual
    assert node.outputs(shapes) == [((rows, width), FLOAT, -1)]
    assert node.takes(shapes) and node.workspace(shapes) == rows * 200 + bias + 2 * residual
    for place, sizes in enumerate(shapes):
        wrong = [*shapes[:place], (*sizes[:-1], sizes[-1] + 2), *shapes[place + 1 :]]
        assert not node.takes(wrong) and b"StreamoMatMul: input" in library.standin_messages()
    pointers = [0x1000 * (i + 1) for i in range(len(shapes))]
    assert node.reloaded().enqueue(shapes, pointers, [0x90000]) == 0
    weights = WeightsSource.in_dll(library, "recorded_weights")
    product = MatmulArguments.in_dll(library, "recorded_matmul")
    assert (weights.inputs, weights.outputs, weights.bits, weights.block, weights.gated) == (64, 48, bits, 32, gated)
    assert (weights.codes, weights.scales, product.input, product.output) == (*pointers[1:3], pointers[0], 0x90000)
    addends = iter(pointers[3:])
    assert product.bias == (next(addends) if bias else None)
    assert product.residual == (next(addends) if residual else None)
    assert (product.rows, product.input_stride, product.output_stride) == (rows, inputs, width)


def test_while_an_engine_is_built_nothing_is_launched(library: Any) -> None:
    ctypes.c_void_p.in_dll(library, "recorded_table").value = None
    shapes = attention_shapes(True, False)
    assert attention(library, True, False, building=True).enqueue(shapes, [4096] * 11, [8192] * 5) == 0
    assert ctypes.c_void_p.in_dll(library, "recorded_table").value is None


def test_a_cache_that_tensorrt_copied_is_refused(library: Any) -> None:
    shapes = attention_shapes(False, False)
    inputs = [0x1000 * (i + 1) for i in range(len(shapes))]
    assert attention(library, False, False).enqueue(shapes, inputs, [0x90000, inputs[4], 0x91000]) != 0
    assert library.standin_messages() == b"A cache's output must be bound to its input's memory\n"


def test_what_the_kernels_refuse_is_told_to_tensorrts_log(library: Any) -> None:
    library.streamo_tensorrt_messages()
    refuses = ctypes.c_int32.in_dll(library, "recorder_refuses")
    refuses.value = 1
    shapes = attention_shapes(False, False)
    inputs = [0x1000 * (i + 1) for i in range(len(shapes))]
    try:
        assert attention(library, False, False).enqueue(shapes, inputs, [0x90000, *inputs[4:6]]) != 0
    finally:
        refuses.value = 0
    assert library.standin_messages() == b"StreamoTableAttention: the head is too wide\n"
    assert library.streamo_tensorrt_messages() == b"StreamoTableAttention: the head is too wide\n"
    assert library.streamo_tensorrt_messages() == b"", "for those who have no log, once"


def test_wrong_attributes_and_inputs_are_refused_with_a_sentence(library: Any) -> None:
    assert not Node(library, contract.TABLE_ATTENTION, num_heads=8, num_kv_heads=2).pointer
    assert b"an attribute of StreamoTableAttention is missing" in library.standin_messages()
    assert attention(library, True, True).outputs(attention_shapes(True, False)) == []
    assert library.standin_messages() == b"StreamoTableAttention takes 14 inputs, found 11\n"


def test_kernels_are_looked_for_beside_the_library_and_opened_once(library: Any) -> None:
    shapes = attention_shapes(False, False)
    inputs = [0x1000 * (i + 1) for i in range(len(shapes))]
    for _ in range(3):
        attention(library, False, False).enqueue(shapes, inputs, [0x90000, *inputs[4:6]])
    assert ctypes.c_int32.in_dll(library, "recorded_opens").value == 1
    library.recorded_folder.restype = ctypes.c_char_p
    assert library.recorded_folder().endswith(b"/cubins")


# Compiling it on a device ------------------------------------------------------------------------------------------


def has_gpu_products() -> bool:
    from edge import kernels_abi

    path = kernels_abi.library_path()
    return path.is_file() and hasattr(ctypes.CDLL(str(path)), "streamo_gpu_matmul_run")


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders as the development packages of TensorRT and CUDA fill them, with the stand-in inside."""
    for name in ("TENSORRT_FOLDERS", "CUDA_FOLDERS"):
        monkeypatch.setattr(plugin_build, name, (str(tmp_path / "nothing"),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("tensorrt/include", "cuda/include"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(STANDIN / "NvInfer.h", tmp_path / "tensorrt" / "include")
    version = "#define TRT_MAJOR_ENTERPRISE 10\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< Major.\n"
    version += "#define NV_TENSORRT_MINOR 3 //!< Minor.\n#define NV_TENSORRT_PATCH 0\n"
    (tmp_path / "tensorrt" / "include" / "NvInferVersion.h").write_text(version)
    (tmp_path / "cuda" / "include" / "cuda_runtime_api.h").write_text("")
    yield tmp_path


def options(folder: Path) -> tuple[str, str]:
    return str(folder / "tensorrt"), str(folder / "cuda")


def test_one_command_compiles_it_to_where_it_is_looked_for(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_gpu_products():
        pytest.skip("the native library was built without the GPU kernels' launcher")
    plan = plan_build(*options(headers))
    assert plan.version == "10.3.0"
    path = build_plugin(plan)
    assert path == built_path("10.3.0") == headers / "cache" / "streamo-edge" / "tensorrt-10.3.0" / path.name
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = find_plugin(TensorRT(None, (10, 3, 0)))
    assert found.path == path and len(found.sha256) == 64
    with pytest.raises(EngineError, match=r"not built for TensorRT 10\.13\.2"):
        find_plugin(TensorRT(None, (10, 13, 2)))

    monkeypatch.setattr(plugin, "sources_digest", lambda folder: "0123456789abcdef")
    with pytest.raises(
        EngineError, match=r"another version of streamo-edge: from sources \w{16}, expected 0123"
    ) as told:
        find_plugin(TensorRT(None, (10, 3, 0)))
    assert told.value.hint == "Run `streamo-edge build-plugin`"


def test_the_plugin_calls_the_native_library_in_use_and_not_the_one_it_was_linked_with(
    headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_gpu_products():
        pytest.skip("the native library was built without the GPU kernels' launcher")
    older = headers / "older" / kernels_abi.LIBRARY_FILE
    older.parent.mkdir()
    shutil.copy(kernels_abi.library_path(), older)
    build_plugin(replace(plan_build(*options(headers)), kernels=older))
    script = """
from edge.engines.plugin import find_plugin
from edge.engines.toolkit import TensorRT
find_plugin(TensorRT(None, (10, 3, 0)))
print({line.split()[-1] for line in open("/proc/self/maps") if "libstreamo_" in line})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert str(built_path("10.3.0")) in done.stdout and str(kernels_abi.library_path()) in done.stdout
    assert str(older) not in done.stdout


@needs_kernels
def test_headers_in_the_systems_own_folder_are_not_named_again(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_build, "STANDARD_FOLDER", headers / "cuda" / "include")
    command = plan_build(*options(headers)).command(headers / "plugin.so")
    assert [word for word in command if word.startswith("-isystem")] == [f"-isystem{headers / 'tensorrt' / 'include'}"]


@needs_kernels
@pytest.mark.parametrize(
    ("missing", "said", "hint"),
    [
        (
            "tensorrt/include/NvInfer.h",
            r"TensorRT's C\+\+ headers are missing: there is no `NvInfer\.h` in `",
            "libnvinfer",
        ),
        ("cuda/include/cuda_runtime_api.h", r"CUDA's headers are missing: there is no `cuda_runtime_api\.h`", "cudart"),
        ("tensorrt/include/NvInferVersion.h", "does not say which version of TensorRT", "development package"),
    ],
)
def test_what_is_missing_is_named_with_its_package(headers: Path, missing: str, said: str, hint: str) -> None:
    (headers / missing).unlink()
    with pytest.raises(EngineError, match=said) as caught:
        plan_build(*options(headers))
    assert hint in str(caught.value.hint) and caught.value.exit_code == 3


def test_without_a_compiler_the_command_says_so(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_build.shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match=r"There is no C\+\+ compiler"):
        plan_build(*options(headers))


@needs_kernels
def test_the_compilers_first_errors_are_in_the_message_and_nothing_is_left(headers: Path) -> None:
    (headers / "tensorrt" / "include" / "NvInfer.h").write_text("#error not for this plugin\n")
    output = headers / "out" / "plugin.so"
    with pytest.raises(EngineError, match=r"cannot be compiled with .*not for this plugin"):
        build_plugin(plan_build(*options(headers)), output)
    assert not list(output.parent.iterdir())

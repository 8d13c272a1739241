"""Attention on the GPU, from the C ABI down to the kernels, in Triton's interpreter behind a driver that only pretends.

Caches are held to the CPU library's bit by bit, outputs to the maths in numpy and to the CPU library's. The interpreter
also finds accesses outside the arrays, and programs of one launch that depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import INT8_NMSE, needs_kernels, nmse, numpy_attention

from apps.bench.kernel_cases import AttentionCase, AttentionData, Piece, attention_data
from edge import gpu_operations, native
from edge.errors import KernelError
from edge.gpu import Gpu

pytestmark = [needs_kernels, needs_triton, needs_compiler]
FLOAT_NMSE = 1e-6
CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")
ON_HOST = ("new_slots", "spans")

RAGGED = (Piece(5), Piece(1, gap=3), Piece(0, gap=1), Piece(77, gap=2), Piece(64), Piece(0), Piece(130, gap=9))
MOVED = tuple(Piece(piece.length, number % 3, piece.gap) for number, piece in enumerate(RAGGED))
MANY = tuple(Piece(1 + run % 5, run, run % 2) for run in range(64))
OFFSET = {"key_bias": 605.0, "offset": True, "shifts": (0, 25, 4000)}
OFFSET_RUNS = (Piece(70), Piece(33, 1, 2), Piece(1, 2, 1))

CASES = [
    AttentionCase("one token, empty cache", 16, 2, 128),
    AttentionCase("one token, group of 8", 16, 2, 128, 1, (Piece(200),)),
    AttentionCase("one token, group of 7", 14, 2, 128, 1, (Piece(65),)),
    AttentionCase("one token, group of 2", 4, 2, 64, 1, (Piece(1000),)),
    AttentionCase("5 tokens, group of 7", 14, 2, 128, 5, (Piece(130),)),
    AttentionCase("5 tokens, no bias", 4, 2, 64, 5, (Piece(100),), bias=False),
    AttentionCase("144 tokens", 2, 1, 64, 144, (Piece(70),)),
    AttentionCase("65 tokens, empty cache", 2, 1, 64, 65),
    AttentionCase("ragged tiles, 1 token", pieces=RAGGED),
    AttentionCase("ragged tiles, 18 tokens", new_tokens=18, pieces=RAGGED),
    AttentionCase("three runs, 1 token", pieces=MOVED, shifts=(0, 40, 300)),
    AttentionCase("three runs, 20 tokens", new_tokens=20, pieces=MOVED, shifts=(0, 40, 300)),
    AttentionCase("12 runs, 1 token", pieces=MANY[:12], shifts=tuple(range(0, 120, 10))),
    AttentionCase("only empty runs", pieces=(Piece(0), Piece(0, 1)), shifts=(0, 5)),
    AttentionCase("position 1e6", 16, 2, 128, 3, (Piece(90), Piece(70, 1, 4)), (0, 1 << 20), first_position=10**6),
    AttentionCase("offset, 1 token", 16, 2, 128, 1, OFFSET_RUNS, **OFFSET),
    AttentionCase("offset, 5 tokens", 8, 1, 128, 5, OFFSET_RUNS, **OFFSET),
    AttentionCase("offset, group of 7, empty cache", 14, 2, 128, 2, **OFFSET),
    AttentionCase("sparse offset, 1 token", 8, 1, 128, 1, OFFSET_RUNS, sparse=True, **OFFSET),
    AttentionCase("sparse offset, 17 tokens", 2, 1, 64, 17, OFFSET_RUNS, sparse=True, **OFFSET),
    AttentionCase("offset, position 1e6", 4, 2, 64, 2, OFFSET_RUNS, first_position=10**6, **OFFSET),
]  # fmt: skip
FLOAT_CASES = [
    AttentionCase("float, 1 token", 16, 2, 128, 1, (Piece(200),), kv="float32"),
    AttentionCase("float, 5 tokens, group of 7", 14, 2, 128, 5, (Piece(70),), kv="float32"),
    AttentionCase("float, 18 tokens, ragged runs", 4, 2, 64, 18, MOVED, (0, 40, 300), kv="float32"),
    AttentionCase("float, no bias, empty cache", new_tokens=2, bias=False, kv="float32"),
    AttentionCase("float, key bias 605", 16, 2, 128, 2, (Piece(100),), kv="float32", key_bias=605.0),
]
LARGE_CASES = [
    AttentionCase("144 tokens, group of 8", 16, 2, 128, 144, (Piece(300),)),
    AttentionCase("144 tokens, group of 7", 28, 4, 128, 144, MOVED, (0, 40, 300)),
    AttentionCase("64 runs, 1 token", pieces=MANY, shifts=tuple(range(0, 640, 10))),
    AttentionCase("64 runs, 66 tokens", new_tokens=66, pieces=MANY, shifts=tuple(range(0, 640, 10))),
    AttentionCase("offset, 144 tokens", 16, 2, 128, 144, OFFSET_RUNS, **OFFSET),
    AttentionCase("float, 144 tokens", 16, 2, 128, 144, MOVED, (0, 40, 300), kv="float32"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("cuda"), multiprocessors=8)


@pytest.fixture(scope="module")
def gpu(cuda: FakeCuda) -> Iterator[Gpu]:
    with cuda.open() as opened:
        yield opened


def run(gpu: Gpu, data: AttentionData, *, most_spans: int | None = None) -> np.ndarray:
    """The output; the caches of `data` are those that the call leaves. With `most_spans` by a table on the device."""
    given = {name: value for name, value in data.arguments().items() if value is not None}
    heads = given.pop("query_heads")
    arrays = {name: value if name in ON_HOST else gpu.array(value) for name, value in given.items()}
    table = None
    if most_spans is not None:
        capacity, runs = data.case.capacity, len(data.run_cos)
        made = gpu_operations.attention_table(
            data.new_slots, data.spans, capacity=capacity, run_count=runs, most_spans=most_spans
        )
        table = gpu.array(made)
    output = gpu_operations.attention(gpu, query_heads=heads, table=table, most_spans=most_spans, **arrays)
    for name in CACHES:
        if name in arrays:
            setattr(data, name, gpu.numpy(arrays[name]))
    return gpu.numpy(output)


def check(gpu: Gpu, case: AttentionCase, seed: int = 0) -> None:
    """A case's cache against the CPU library's, and its output against the maths and the CPU library's."""
    before = attention_data(case, seed)
    by_cpu, after = before.fresh(), before.fresh()
    expected = native.attention(**by_cpu.arguments())
    found = run(gpu, after)
    for name in CACHES:
        ours, theirs = getattr(after, name), getattr(by_cpu, name)
        assert (ours is theirs is None) or ours.tobytes() == theirs.tobytes(), name
    limit = INT8_NMSE if case.kv == "int8" else FLOAT_NMSE
    assert nmse(found, numpy_attention(before, after)) <= limit
    assert nmse(found, expected) <= 2 * limit


@pytest.mark.parametrize("case", CASES + FLOAT_CASES, ids=lambda case: case.name)
def test_a_call_does_what_the_cpu_does(gpu: Gpu, case: AttentionCase):
    check(gpu, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
def test_a_large_call_does_what_the_cpu_does(gpu: Gpu, case: AttentionCase):
    check(gpu, case)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.builds(Piece, st.integers(0, 90), st.integers(0, 2), st.integers(0, 3)), max_size=5),
    tokens=st.integers(1, 9),
    kv=st.sampled_from(["int8", "float32"]),
)
def test_any_layout_of_spans_gives_what_the_maths_says(gpu: Gpu, pieces: list[Piece], tokens: int, kv: str):
    check(gpu, AttentionCase("drawn", 2, 1, 64, tokens, tuple(pieces), (0, 7, 500), kv=kv))


@pytest.mark.parametrize(("processors", "splits"), [(1, 1), (132, 7)])
def test_splits_fill_the_processors_whatever_the_depth(tmp_path: Path, processors: int, splits: int):
    before = attention_data(AttentionCase("deep", pieces=(Piece(400),), spare_rows=400))
    fake = FakeCuda(tmp_path, multiprocessors=processors)
    with fake.open() as gpu:
        after = before.fresh()
        found = run(gpu, after)
        grids = list(fake.launched)
        assert ("attend_int8_d64_m16", (2, 1, splits)) in grids
        assert nmse(found, numpy_attention(before, after)) <= INT8_NMSE
        assert run(gpu, before.fresh()).tobytes() == found.tobytes()
        run(gpu, attention_data(AttentionCase("shallow", pieces=(Piece(10),), spare_rows=790)))
        assert fake.launched == grids * 3


# ------------------------------------------------------------------------------------------------- weights and scales


def plain_case(depth: int) -> AttentionData:
    """One head of 64 that nothing turns; scores are powers of two, by the keys' first channel alone."""
    data = attention_data(AttentionCase("plain", 1, 1, 64, 1, (Piece(depth),), bias=False))
    data.qkv[:] = 0
    data.key_cache[:] = 0
    data.value_cache[:] = 0
    data.qkv[0, 0] = 8 / np.log2(np.e)
    data.rope_cos[:], data.rope_sin[:], data.run_cos[:], data.run_sin[:] = 1, 0, 1, 0
    return data


@pytest.mark.parametrize("gap", [12.3, 20.3, 26.6])
def test_many_light_rows_beside_a_heavy_one_are_not_lost(gpu: Gpu, gap: float):
    """Weights of 2^-gap in float16, without anything to lift them, would be subnormal or 0."""
    data = plain_case(2000)
    assert data.key_scales is not None and data.value_scales is not None
    data.key_cache[0, :2000, 0] = 127
    data.key_scales[0, :2000] = -gap / 127
    data.key_scales[0, 3] = 0  # the heavy row, whose value is 0
    data.value_cache[0, :2000, 5] = 100
    data.value_scales[0, :2000] = 0.01
    data.value_cache[0, 3] = 0
    light = 1999 * 2.0**-gap
    expected = light / (light + 2)  # the new token's score is 0 too
    assert run(gpu, data)[0, 5] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("lowest", [-30, -125])
def test_scales_of_values_may_differ_by_many_powers_of_two(gpu: Gpu, lowest: int):
    data = plain_case(130)
    assert data.key_scales is not None and data.value_scales is not None
    random = np.random.default_rng(1)
    data.key_cache[0, :130, 0] = random.integers(-127, 128, 130)
    data.key_scales[0, :130] = 3 / 127
    data.value_cache[0, :130] = random.integers(-127, 128, (130, 64))
    data.value_scales[0, :130] = 2.0 ** random.integers(lowest, lowest + 61, 130)
    data.value_scales[0, [7, 64]] = 0
    data.value_cache[0, [7, 64]] = 0
    expected = native.attention_reference(**data.fresh().arguments())
    assert nmse(run(gpu, data), expected) <= 1e-6


# ------------------------------------------------------------------------------------------------------------- tables


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.builds(Piece, st.integers(0, 300), st.integers(0, 3), st.integers(0, 3)), max_size=8),
    tokens=st.integers(1, 9),
    more=st.integers(0, 3),
)
def test_a_table_names_every_row_once_and_runs_lie_together(pieces: list[Piece], tokens: int, more: int):
    data = attention_data(AttentionCase("table", 1, 1, 64, tokens, tuple(pieces), (0,) * 4))
    most = len(data.spans) + more
    made = gpu_operations.attention_table(
        data.new_slots, data.spans, capacity=data.case.capacity, run_count=4, most_spans=most
    ).view(np.int32)  # fmt: skip
    slots = -(-tokens // 4) * 4
    tiles = made[4 + slots :].reshape(-1, 4)
    used, behind = tiles[: made[0]], tiles[made[0]]
    np.testing.assert_array_equal(made[4 : 4 + tokens], data.new_slots)
    assert not behind.any() and (used[:, 1] >= 1).all() and (used[:, 1] <= 64).all()
    found = [(row, run) for first, count, run, _ in used for row in range(first, first + count)]
    expected = [(row, run) for slot, length, run in data.spans for row in range(slot, slot + length)]
    assert sorted(found) == sorted(expected)
    for index, (_, _, run, stop) in enumerate(used):
        assert (used[index:stop, 2] == run).all() and (stop == len(used) or used[stop, 2] != run)


def test_a_recorded_step_follows_its_table(gpu: Gpu):
    """A decode step in a graph: the table, the inputs and the caches change, the launches do not."""
    case = AttentionCase("step", 4, 2, 64, 1, (Piece(100), Piece(30, 1)), (0, 9), spare_rows=60)
    first = attention_data(case, seed=1)
    longer = attention_data(AttentionCase("longer", 4, 2, 64, 1, (Piece(140), Piece(20, 1)), (0, 9), spare_rows=30), 2)
    assert first.case.capacity == longer.case.capacity
    names = [name for name in first.arguments() if name not in ("query_heads", "spans", "new_slots")]
    names = [name for name in names if getattr(first, name) is not None]
    arrays = {name: gpu.array(getattr(first, name)) for name in names}
    hosts = {name: getattr(first, name) for name in ("spans", "new_slots")}

    def table(data: AttentionData) -> np.ndarray:
        return gpu_operations.attention_table(
            data.new_slots, data.spans, capacity=case.capacity, run_count=2, most_spans=9
        )

    on_device, stream = gpu.array(table(first)), gpu.make("stream")
    gpu.load("append"), gpu.load("attend"), gpu.load("merge")
    output = gpu.empty((1, 256))
    given = {"query_heads": 4, "table": on_device, "most_spans": 9, "output": output, "stream": stream}
    gpu_operations.attention(gpu, **given, **arrays, **hosts)
    gpu.synchronize(stream)
    gpu.begin_graph(stream)
    gpu_operations.attention(gpu, **given, **arrays, **hosts)
    graph = gpu.end_graph(stream)
    for data in (longer, first):
        for name in names:
            gpu.write(arrays[name], getattr(data, name), stream)
        gpu.write(on_device, table(data), stream)
        gpu.run_graph(graph, stream)
        assert gpu.numpy(output, stream).tobytes() == run(gpu, data.fresh()).tobytes()
    gpu.destroy("graph", graph)
    gpu.destroy("stream", stream)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_call_that_sends_its_table_cannot_be_recorded(gpu: Gpu):
    """The graph would read memory of the host that has long been something else."""
    data = attention_data(AttentionCase("recorded", pieces=(Piece(10),)))
    given = {name: value for name, value in data.arguments().items() if value is not None}
    heads = given.pop("query_heads")
    arrays = {name: value if name in ON_HOST else gpu.array(value) for name, value in given.items()}
    stream = gpu.make("stream")
    gpu_operations.attention(gpu, query_heads=heads, stream=stream, **arrays)
    gpu.begin_graph(stream)
    with pytest.raises(KernelError, match="cannot be recorded in a graph"):
        gpu_operations.attention(gpu, query_heads=heads, stream=stream, **arrays)
    gpu.destroy("graph", gpu.end_graph(stream))
    gpu.destroy("stream", stream)


@pytest.mark.parametrize("table", [False, True])
def test_what_does_not_fit_is_refused_before_anything_is_launched(gpu: Gpu, cuda: FakeCuda, table: bool):
    launched = len(cuda.launched)
    odd = attention_data(AttentionCase("odd", 4, 2, 80, 1, (Piece(10),)))
    with pytest.raises(KernelError, match="head_dim of 64 and 128, found 80"):
        run(gpu, odd, most_spans=4 if table else None)
    data = attention_data(AttentionCase("spans", 4, 2, 64, 1, (Piece(10), Piece(5))))
    data.spans[1, 0] = 3
    with pytest.raises(KernelError, match="names a row that an earlier span names too"):
        run(gpu, data, most_spans=4 if table else None)
    if table:
        with pytest.raises(KernelError, match="at most 1 spans, found 2"):
            run(gpu, attention_data(AttentionCase("many", pieces=(Piece(3), Piece(4)))), most_spans=1)
    assert len(cuda.launched) == launched

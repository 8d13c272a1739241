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
    AttentionCase("one token, group of 7", 28, 4, 128, 1, (Piece(65),)),
    AttentionCase("one token, group of 2", 4, 2, 64, 1, (Piece(1000),)),
    AttentionCase("5 tokens, group of 7", 28, 4, 128, 5, (Piece(130),)),
    AttentionCase("5 tokens, no bias", 4, 2, 64, 5, (Piece(100),), bias=False),
    AttentionCase("144 tokens", 16, 2, 128, 144, (Piece(70),)),
    AttentionCase("65 tokens, empty cache", 4, 2, 64, 65),
    AttentionCase("ragged tiles, 1 token", pieces=RAGGED),
    AttentionCase("ragged tiles, 66 tokens", new_tokens=66, pieces=RAGGED),
    AttentionCase("three runs, 1 token", pieces=MOVED, shifts=(0, 40, 300)),
    AttentionCase("three runs, 20 tokens", new_tokens=20, pieces=MOVED, shifts=(0, 40, 300)),
    AttentionCase("64 runs, 1 token", pieces=MANY, shifts=tuple(range(0, 640, 10))),
    AttentionCase("only empty runs", pieces=(Piece(0), Piece(0, 1)), shifts=(0, 5)),
    AttentionCase("position 1e6", 16, 2, 128, 3, (Piece(90), Piece(70, 1, 4)), (0, 1 << 20), first_position=10**6),
    AttentionCase("offset, 1 token", 16, 2, 128, 1, OFFSET_RUNS, **OFFSET),
    AttentionCase("offset, 17 tokens", 16, 2, 128, 17, OFFSET_RUNS, **OFFSET),
    AttentionCase("offset, group of 7, empty cache", 28, 4, 128, 5, **OFFSET),
    AttentionCase("sparse offset, 1 token", 16, 2, 128, 1, OFFSET_RUNS, sparse=True, **OFFSET),
    AttentionCase("sparse offset, 40 tokens", 4, 2, 64, 40, OFFSET_RUNS, sparse=True, **OFFSET),
    AttentionCase("offset, position 1e6", 4, 2, 64, 2, OFFSET_RUNS, first_position=10**6, **OFFSET),
]  # fmt: skip
FLOAT_CASES = [
    AttentionCase("float, 1 token", 16, 2, 128, 1, (Piece(200),), kv="float32"),
    AttentionCase("float, 5 tokens, group of 7", 28, 4, 128, 5, (Piece(70),), kv="float32"),
    AttentionCase("float, 66 tokens, ragged runs", 4, 2, 64, 66, MOVED, (0, 40, 300), kv="float32"),
    AttentionCase("float, no bias, empty cache", new_tokens=2, bias=False, kv="float32"),
    AttentionCase("float, key bias 605", 16, 2, 128, 2, (Piece(100),), kv="float32", key_bias=605.0),
]


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

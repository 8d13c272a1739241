"""Attention on a real GPU: the cases of the interpreter's tests, and that repeating a call changes no bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_cases import needs_kernels
from test_gpu_attention import CASES, FLOAT_CASES, LARGE_CASES, MANY, check, run

from apps.bench.kernel_cases import AttentionCase, Piece, attention_data
from edge.errors import BackendError, DeviceError
from edge.gpu import Gpu

pytestmark = [pytest.mark.gpu, needs_kernels]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    try:
        opened = Gpu()
    except (BackendError, DeviceError) as error:
        pytest.skip(error.message)
    with opened:
        yield opened


@pytest.mark.parametrize("case", CASES + FLOAT_CASES + LARGE_CASES, ids=lambda case: case.name)
def test_a_call_does_what_the_cpu_does(gpu: Gpu, case: AttentionCase):
    check(gpu, case)


DEEP_CASES = [
    AttentionCase("one token at 16,384", 16, 2, 128, 1, (Piece(16384),)),
    AttentionCase("144 tokens at 4,096", 16, 2, 128, 144, (Piece(4096),)),
    AttentionCase("one token, 64 runs", 28, 4, 128, 1, MANY, tuple(range(0, 640, 10))),
    AttentionCase("one token, offset", 16, 2, 128, 1, (Piece(3000),), key_bias=605.0, offset=True),
    AttentionCase("one token, float", 16, 2, 128, 1, (Piece(3000),), kv="float32"),
]  # fmt: skip


@pytest.mark.parametrize("case", DEEP_CASES, ids=lambda case: case.name)
def test_200_runs_give_the_same_bits(gpu: Gpu, case: AttentionCase):
    before = attention_data(case)
    first = run(gpu, before.fresh()).tobytes()
    assert all(run(gpu, before.fresh()).tobytes() == first for _ in range(199))

"""Workspaces that are reserved before sizes are known: no call within the bounds needs more."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

from edge import gpu_abi as abi
from edge.gpu import Gpu
from edge.kernels_abi import AttentionArguments, MatmulArguments, WeightsSource

pytestmark = [needs_kernels, needs_triton, needs_compiler]
SOMEWHERE = 0x1000
"""An address; only whether it is there counts."""


def need(gpu: Gpu, function: str, *arguments: Any) -> int:
    found = ctypes.c_size_t()
    passed = [ctypes.byref(value) if isinstance(value, ctypes.Structure) else value for value in arguments]
    gpu.call(function, *passed, ctypes.byref(found))
    return found.value


@pytest.fixture(params=[8, 132])
def gpu(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    with FakeCuda(tmp_path, chosen=[], multiprocessors=request.param).open() as opened:
        yield opened


@pytest.mark.parametrize("int8", [0, 1])
@pytest.mark.parametrize("offset", [None, SOMEWHERE])
@pytest.mark.parametrize("heads", [(4, 2), (28, 4)])
@pytest.mark.parametrize("most_runs", [1, 64])
def test_attention_with_fewer_tokens_rows_and_runs_fits(
    gpu: Gpu, heads: tuple[int, int], int8: int, offset: int | None, most_runs: int
) -> None:
    def call(tokens: int, capacity: int, runs: int) -> AttentionArguments:
        return AttentionArguments(query_heads=heads[0], kv_heads=heads[1], head_dim=128, capacity=capacity, scale=1.0,
                                  new_tokens=tokens, run_count=runs, kv_type=int8, key_offset=offset)  # fmt: skip

    for most_tokens, most_capacity in ((1, 5000), (2, 300), (70, 3000), (200, 5000)):
        most = need(gpu, "attention_most_workspace", call(most_tokens, most_capacity, most_runs))
        for capacity in (64, 65, most_capacity // 2, most_capacity - 64, most_capacity):
            for tokens in range(1, min(most_tokens, capacity) + 1):
                assert need(gpu, "attention_workspace", call(tokens, capacity, most_runs)) <= most


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 320), (4096, 512), (3584, 8192), (100, 96)])
@pytest.mark.parametrize("added", [None, SOMEWHERE])
def test_a_product_of_fewer_rows_fits(
    gpu: Gpu, bits: int, gated: int, inputs: int, outputs: int, added: int | None
) -> None:
    def call(rows: int, place: int | None = SOMEWHERE) -> tuple[WeightsSource, MatmulArguments, int]:
        source = WeightsSource(inputs, outputs, bits, 32, gated, place, place)
        arguments = MatmulArguments(rows, place, added, added, place, inputs, outputs // (1 + gated))
        return source, arguments, abi.ACTIVATIONS_AUTO

    for most_rows in (1, 5, 70, 300):
        most = need(gpu, "matmul_most_workspace", *call(most_rows, None))
        needs = [need(gpu, "matmul_workspace", *call(rows)) for rows in range(1, most_rows + 1)]
        assert max(needs) == most

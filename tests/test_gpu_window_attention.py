"""Attention inside the vision tower's windows on the GPU, from the C ABI to the kernel, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels, nmse
from test_window_attention_kernels import data_of, plain

from edge import gpu_operations, native
from edge.errors import KernelError
from edge.gpu import Gpu

pytestmark = [needs_kernels, needs_triton, needs_compiler]
FLOAT16_NMSE = 1e-6
CASES = [
    (4, 80, (64, 64, 32, 3)),
    (1, 80, (150,)),
    (2, 32, (16, 8, 0, 16)),
    (2, 64, (65, 1)),
    (1, 128, (70,)),
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    with FakeCuda(tmp_path_factory.mktemp("cuda")).open() as opened:
        yield opened


def run(gpu: Gpu, data: tuple[np.ndarray, ...], heads: int, *, starts_on_device: bool = False) -> np.ndarray:
    qkv, cos, sin, starts = data
    on_device = gpu.array(starts) if starts_on_device else None
    given = [gpu.array(array) for array in (qkv, cos, sin)]
    return gpu.numpy(gpu_operations.window_attention(gpu, *given, starts, heads=heads, device_starts=on_device))


@pytest.mark.parametrize(("heads", "width", "windows"), CASES, ids=str)
def test_windows_give_what_the_maths_and_the_cpu_say(gpu: Gpu, heads: int, width: int, windows: tuple[int, ...]):
    data = data_of(heads, width, windows)
    found = run(gpu, data, heads)
    assert nmse(found, plain(*data, heads)) <= FLOAT16_NMSE
    assert nmse(found, native.window_attention(*data, heads=heads)) <= FLOAT16_NMSE
    assert run(gpu, data, heads, starts_on_device=True).tobytes() == found.tobytes()


def test_numbers_beyond_float16_neither_overflow_nor_vanish(gpu: Gpu):
    qkv, cos, sin, starts = data_of(1, 80, (40, 30))
    by_part = qkv.reshape(70, 3, 80)
    by_part[:, 0] *= 1e6
    by_part[:, 1] *= 1e-6
    by_part[:35, 2] *= 1e8
    by_part[35:, 2] *= 1e-8
    by_part[[10, 50], 2] = 0
    found, expected = run(gpu, (qkv, cos, sin, starts), 1), plain(qkv, cos, sin, starts, 1)
    for rows in (slice(0, 40), slice(40, 70)):
        assert nmse(found[rows], expected[rows]) <= FLOAT16_NMSE


def test_a_width_without_kernels_is_refused(gpu: Gpu):
    with pytest.raises(KernelError, match="head_dim of 32, 64, 80 and 128, found 16"):
        run(gpu, data_of(2, 16, (8,)), 2)

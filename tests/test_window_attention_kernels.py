"""Attention inside the windows of the vision tower: each instruction set against the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_cases import FLOAT_NMSE, available_sets, instruction_set, needs_kernels, nmse, softmax

from apps.bench.kernel_cases import angles, rotate
from edge import native

pytestmark = needs_kernels
CASES = [
    (heads, width, windows)
    for heads, width in ((16, 80), (2, 64), (3, 16), (1, 128))
    for windows in ((1,), (64,), (65, 1), (64, 64, 32, 3), (480,), (16, 8, 0, 16))
]


def data_of(heads: int, width: int, windows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """qkv, cos, sin, window_starts."""
    starts = np.concatenate([[0], np.cumsum(windows)]).astype(np.int32)
    qkv = np.random.default_rng(0).standard_normal((starts[-1], 3 * heads * width)).astype(np.float32)
    cos, sin = angles(np.arange(starts[-1]), width)
    return qkv, cos.astype(np.float32), sin.astype(np.float32), starts


def plain(qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, starts: np.ndarray, heads: int) -> np.ndarray:
    """The same in numpy, float64."""
    rows = qkv.astype(np.float64).reshape(len(qkv), 3, heads, -1)
    queries, keys = (rotate(rows[:, i], cos[:, None], sin[:, None]) for i in (0, 1))
    output = np.empty_like(queries)
    for first, last in itertools.pairwise(starts):
        if first == last:
            continue
        scores = np.einsum("phd,rhd->hpr", queries[first:last], keys[first:last]) * queries.shape[2] ** -0.5
        output[first:last] = np.einsum("hpr,rhd->phd", softmax(scores), rows[first:last, 2])
    return output.reshape(len(qkv), -1)


@pytest.mark.parametrize(("heads", "width", "windows"), CASES, ids=str)
def test_every_instruction_set_agrees_with_the_oracle_and_numpy(heads: int, width: int, windows: tuple[int, ...]):
    data = data_of(heads, width, windows)
    oracle = native.window_attention_reference(*data, heads=heads)
    assert nmse(oracle, plain(*data, heads)) <= 1e-12
    for name in available_sets():
        with instruction_set(name):
            assert nmse(native.window_attention(*data, heads=heads), oracle) <= FLOAT_NMSE, name


def test_the_number_of_threads_changes_no_bit():
    data = data_of(4, 80, (64, 64, 10, 64))
    alone = native.window_attention(*data, heads=4)
    for count in (2, 3):
        with native.Threads(count) as threads:
            assert native.window_attention(*data, heads=4, threads=threads).tobytes() == alone.tobytes()


def test_torch_gives_the_same_on_one_window():
    torch = pytest.importorskip("torch")
    qkv, cos, sin, starts = data_of(4, 80, (96,))
    rows = qkv.reshape(96, 3, 4, 80).transpose(1, 2, 0, 3)
    queries, keys, values = rotate(rows[0], cos, sin), rotate(rows[1], cos, sin), rows[2]
    by_head = [torch.from_numpy(np.ascontiguousarray(array, np.float32))[None] for array in (queries, keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head)[0].numpy().swapaxes(0, 1).reshape(96, -1)
    assert nmse(native.window_attention(qkv, cos, sin, starts, heads=4), expected) <= FLOAT_NMSE

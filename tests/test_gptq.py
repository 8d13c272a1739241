"""GPTQ against rounding to nearest: what a map's outputs become, not what its weights become."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import export.gptq as gptq_module
from edge.errors import CheckpointError
from export.gptq import _factor, gptq, input_products, inverse_cholesky
from export.quantize import LARGEST, quantize_blocks


def correlated(tokens: int, k: int, seed: int = 0, rank: int = 12) -> np.ndarray:
    """Inputs (T, K) that mostly lie in a few directions, as activations do, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, k))
    inputs += 0.3 * rng.standard_normal((tokens, k))
    return (inputs * np.exp(rng.standard_normal(k))).astype(np.float32)


def weight(k: int, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return codes * np.repeat(scales, len(codes) // len(scales), axis=0)


def output_error(inputs: np.ndarray, values: np.ndarray, rounded: np.ndarray) -> float:
    return float(np.linalg.norm(inputs @ (rounded - values)) / np.linalg.norm(inputs @ values))


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_outputs_on_correlated_inputs_are_nearer_than_with_rounding_to_nearest(block: int, dtype: str) -> None:
    inputs, values = correlated(512, 256), weight(256, 48)
    nearest = dequantized(*quantize_blocks(values, block, dtype))
    fitted = dequantized(*gptq(values, input_products(inputs, 256, block), block, dtype))
    unseen = correlated(512, 256)[::-1]
    assert output_error(unseen, values, fitted) < 0.6 * output_error(unseen, values, nearest)


def test_it_also_holds_on_inputs_of_the_same_kind_that_were_not_calibrated_on() -> None:
    both, values = correlated(1024, 256), weight(256, 48)
    fitted = dequantized(*gptq(values, input_products(both[:512], 256, 64), 64, "int4"))
    nearest = dequantized(*quantize_blocks(values, 64, "int4"))
    assert output_error(both[512:], values, fitted) < 0.8 * output_error(both[512:], values, nearest)


@settings(max_examples=25, deadline=None)
@given(
    k=st.sampled_from([32, 64, 96]),
    n=st.integers(1, 9),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["int4", "int8"]),
)
def test_codes_are_within_range_and_scales_positive(k: int, n: int, tokens: int, seed: int, dtype: str) -> None:
    codes, scales = gptq(weight(k, n, seed), input_products(correlated(tokens, k, seed), k, 32), 32, dtype)
    assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() <= LARGEST[dtype]
    assert codes.shape == (k, n) and scales.shape == (k // 32, n) and (scales > 0).all() and np.isfinite(scales).all()


def test_inputs_that_do_not_depend_on_each_other_leave_only_the_scales_to_choose() -> None:
    values = weight(64, 8)
    products = input_products(np.eye(64, dtype=np.float32), 64, 32)
    codes, scales = gptq(values, products, 32, "int8")
    np.testing.assert_array_equal(codes, np.clip(np.rint(values / np.repeat(scales, 32, axis=0)), -127, 127))


def test_channels_that_are_never_fed_are_rounded_to_nearest_and_padding_stays_zero() -> None:
    values = weight(96, 4)
    values[80:] = 0
    codes, scales = gptq(values, input_products(correlated(50, 80), 96, 32), 32, "int4")
    assert not codes[80:].any()
    dead = input_products(np.zeros((5, 96), np.float32), 96, 32)
    codes, scales = gptq(values, dead, 32, "int4")
    assert output_error(np.eye(96, dtype=np.float32), values, dequantized(codes, scales)) < 0.15


def test_the_factor_is_that_of_the_inverse() -> None:
    inputs = correlated(300, 40)
    products = input_products(inputs, 40, 8)[0].products
    upper = _factor(products).astype(np.float64)
    damped = products + np.eye(40) * gptq_module.DAMPING * np.mean(np.diag(products))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(40), atol=1e-3)
    assert not np.tril(upper, -1).any()


@pytest.mark.parametrize("size", [1, 127, 128, 129, 500])
def test_the_factor_by_halves_is_that_of_lapack(size: int) -> None:
    rows = np.random.default_rng(size).standard_normal((size, size + 3))
    matrix = rows @ rows.T
    found = inverse_cholesky(matrix)
    np.testing.assert_allclose(found @ np.linalg.cholesky(matrix), np.eye(size), atol=1e-8)
    assert not np.triu(found, 1).any()
    with pytest.raises(np.linalg.LinAlgError):
        inverse_cholesky(-matrix)


def test_activations_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        gptq(weight(32, 4), input_products(np.full((3, 32), np.inf, np.float32), 32, 32), 32, "int4")


def test_a_wide_map_is_fitted_segment_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, values = correlated(512, 256), weight(256, 16)
    monkeypatch.setattr(gptq_module, "SEGMENT_ROWS", 100)
    segments = input_products(inputs, 256, 32)
    assert [(s.first, s.last) for s in segments] == [(0, 64), (64, 160), (160, 256)]
    fitted = dequantized(*gptq(values, segments, 32, "int4"))
    nearest = dequantized(*quantize_blocks(values, 32, "int4"))
    assert output_error(inputs, values, fitted) < output_error(inputs, values, nearest)


SCRIPT = """
import hashlib, numpy as np
from test_gptq import correlated, weight
from export.gptq import gptq, input_products
codes, scales = gptq(weight(512, 300), input_products(correlated(2000, 512), 512, 32), 32, "int4")
print(hashlib.sha256(codes.tobytes() + scales.tobytes()).hexdigest())
"""


def test_the_same_inputs_give_the_same_codes_whatever_the_number_of_threads() -> None:
    def digest(threads: str) -> str:
        counts = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
        environment: dict[str, Any] = {**os.environ, **counts, "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert digest("1") == digest("2") == digest("1")

"""What the tests of the native kernels share: the maths in plain numpy, and the error measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from apps.bench.kernel_cases import AttentionData, MatmulData, angles, biases, rotate
from edge import native

INSTRUCTION_SETS = ("avx512vnni", "avx2", "i8mm", "dotprod", "portable")
FLOAT_NMSE = 1e-9
INT8_NMSE = 5e-4

needs_kernels = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


def available_sets() -> list[str]:
    """The instruction sets that this machine has."""
    return [name for name in INSTRUCTION_SETS if native.instruction_set_available(name)]


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Calls inside use this one."""
    native.select_instruction_set(name)
    try:
        yield
    finally:
        native.select_instruction_set(None)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the mean square of what is expected; infinite where a number is not finite."""
    if not np.isfinite(found).all():
        return np.inf
    expected = np.asarray(expected, np.float64)
    error = np.mean((np.asarray(found, np.float64) - expected) ** 2)
    return float(error / max(np.mean(expected**2), 1e-30))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest difference, as a part of the greatest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def new_rows(data: AttentionData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries (T, Hq, D), keys and values (T, Hkv, D) of the new tokens with their bias, float64, not yet turned."""
    case = data.case
    qkv = data.qkv.astype(np.float64) + (0 if data.qkv_bias is None else data.qkv_bias.astype(np.float64))
    by_head = qkv.reshape(case.new_tokens, -1, case.head_dim)
    queries, keys, values = np.split(by_head, [case.query_heads, case.query_heads + case.kv_heads], 1)
    return queries, keys, values


def cached_rows(data: AttentionData) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the cache says of the rows that spans name, in order.

    Returns:
      keys, values (rows, Hkv, D) float64 with offset and bias put back; positions as written; each row's run.
    """
    spans = data.spans
    rows = np.concatenate([np.arange(slot, slot + length) for slot, length, _ in spans] or [np.zeros(0, int)])
    rows = rows.astype(np.int64)
    runs = np.repeat(spans[:, 2], spans[:, 1])
    keys, values = data.key_cache[:, rows].astype(np.float64), data.value_cache[:, rows].astype(np.float64)
    if data.case.kv == "int8":
        assert data.key_scales is not None and data.value_scales is not None
        keys *= data.key_scales[:, rows, None]
        values *= data.value_scales[:, rows, None]
        values += biases(data)[1][:, None]
    if data.key_offset is not None:
        cos, sin = angles(data.slot_positions[rows], data.case.head_dim)
        keys += rotate(data.key_offset.astype(np.float64)[:, None], cos, sin)
    return keys.swapaxes(0, 1), values.swapaxes(0, 1), data.slot_positions[rows], runs


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def numpy_attention(before: AttentionData, after: AttentionData) -> np.ndarray:
    """The whole op in float64, from the maths: every key is turned to the place where it now stands.

    Args:
      before: the case as it was; its cache gives the old rows.
      after: the same after a call; its cache gives the new rows, as they were rounded.

    Returns:
      (T, Hq D) float64.
    """
    case = before.case
    old_keys, old_values, written, runs = cached_rows(before)
    shifts = np.asarray(case.shifts)[runs] if len(runs) else np.zeros(0)
    old_keys = rotate(old_keys, *(table[:, None] for table in angles(-shifts, case.head_dim)))
    queries, keys, values = new_rows(before)
    here = tuple(table[:, None] for table in angles(before.new_positions, case.head_dim))
    queries = rotate(queries, *here)
    if case.kv == "int8":
        keys, values = _new_rows_from_cache(after)
    else:
        keys = rotate(keys, *here)
    group = case.query_heads // case.kv_heads
    all_keys = np.repeat(np.concatenate([old_keys, keys]), group, 1)
    all_values = np.repeat(np.concatenate([old_values, values]), group, 1)
    scores = np.einsum("thd,shd->hts", queries, all_keys) * case.head_dim**-0.5
    hidden = np.arange(len(all_keys))[None] > case.depth + np.arange(case.new_tokens)[:, None]
    scores[:, hidden] = -np.inf
    assert written.shape == runs.shape
    return np.einsum("hts,shd->thd", softmax(scores), all_values).reshape(case.new_tokens, -1)


def _new_rows_from_cache(after: AttentionData) -> tuple[np.ndarray, np.ndarray]:
    slots = np.stack([after.new_slots, np.ones_like(after.new_slots), np.zeros_like(after.new_slots)], 1)
    named = AttentionData(**{**vars(after), "spans": slots})
    keys, values, _, _ = cached_rows(named)
    return keys, values


def numpy_product(data: MatmulData, *, quantise: bool) -> np.ndarray:
    """The product in float64, with the input as it is or rounded to 8 bits by row and block."""
    case = data.case
    given = data.input.astype(np.float64)
    if quantise:
        given = _rounded(data.input.reshape(case.rows, -1, case.block)).reshape(case.rows, -1)
    found = given @ data.weights() + (0 if data.bias is None else data.bias)
    if case.gated:
        gate, up = np.split(found, 2, 1)
        found = gate / (1 + np.exp(np.minimum(-gate, 700))) * up
    return found + (0 if data.residual is None else data.residual)


def _rounded(blocks: np.ndarray) -> np.ndarray:
    """Blocks (..., block) float32 through 8 bits, in float64; multiplied by 127 / max, where ties may fall elsewhere
    than with a division by max / 127."""
    largest = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(blocks * inverse) * (largest / np.float32(127)).astype(np.float64)

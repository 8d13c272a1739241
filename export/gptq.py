"""Weights to codes by what is fed to them: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Owns the arithmetic for one matrix. Rows along K are rounded one after another; what rounding a row does to the map's
outputs on the calibration inputs is made up for by the rows that follow. Codes and scales are of the same kind as
`quantize.quantize_blocks` gives, so no graph or kernel can tell the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edge.errors import CheckpointError
from export.quantize import LARGEST

DAMPING = 0.01
"""Added to each input's mean square, as a part of the mean over all inputs, so that the products can be inverted."""
SEGMENT_ROWS = 4096
"""A wider K is cut into segments that are made up for separately: their products take K x K numbers of 8 bytes."""
PIECE_TOKENS = 1024
COLUMNS = 1024
WINDOW_ROWS, BATCH_ROWS = 32, 128
CHOLESKY_ROWS = 128
SHRINKING = tuple(np.float32(1 - 0.04 * step) for step in range(8))
"""Scales that are tried, as parts of the one that lets the largest weight of a block keep its value."""


@dataclass(frozen=True)
class Segment:
    """Rows `first` to `last` of K and the sums of products of their inputs, (rows, rows) float32."""

    first: int
    last: int
    products: np.ndarray


def input_products(inputs: np.ndarray, k: int, block: int) -> list[Segment]:
    """Sums over tokens of the products of inputs (T, own K), by segments of K.

    Args:
      k: rows of the weight; those beyond the inputs' own are never fed.
      block: segments start where a block does.
    """
    count = -(-k // SEGMENT_ROWS)
    blocks = k // block
    edges = [block * (blocks * i // count) for i in range(count + 1)]
    segments = []
    for first, last in pairwise(edges):
        own = max(0, min(last, inputs.shape[1]) - first)
        products = np.zeros((last - first, last - first), np.float32)
        for start in range(0, len(inputs), PIECE_TOKENS):
            piece = np.ascontiguousarray(inputs[start : start + PIECE_TOKENS, first : first + own])
            products[:own, :own] += piece.T @ piece
        segments.append(Segment(first, last, products))
    return segments


def gptq(values: np.ndarray, segments: list[Segment], block: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a weight (K, N) for the inputs that `segments` were made from.

    Returns:
      Codes (K, N) int8 and scales (K / block, N) float32.
    """
    codes = np.empty(values.shape, np.int8)
    scales = np.empty((len(values) // block, values.shape[1]), np.float32)
    for segment in segments:
        rows = slice(segment.first, segment.last)
        blocks = slice(segment.first // block, segment.last // block)
        factor, squares = _factor(segment.products), np.diag(segment.products)
        for column in range(0, values.shape[1], COLUMNS):
            columns = slice(column, column + COLUMNS)
            codes[rows, columns], scales[blocks, columns] = _round(
                values[rows, columns].copy(), factor, squares, block, np.float32(LARGEST[dtype])
            )
    return codes, scales


def _factor(products: np.ndarray) -> np.ndarray:
    """Upper triangular U with U' U the inverse of the damped products, float32.

    Raises:
      CheckpointError: the products hold something that is not a number.
    """
    if not np.isfinite(products).all():
        raise CheckpointError(
            "Activations of the calibration turns are not finite: the checkpoint overflows float32",
            hint="Check that its own framework runs it, or export with `--method nearest`",
        )
    damped = products[::-1, ::-1].astype(np.float64)  # in the reversed order the inverse's factor comes out upper
    diagonal = np.diag(damped).copy()
    mean = float(np.mean(diagonal)) or 1.0
    damping = DAMPING
    while True:
        try:
            damped[np.diag_indices_from(damped)] = diagonal + damping * mean
            return inverse_cholesky(damped)[::-1, ::-1].astype(np.float32)
        except np.linalg.LinAlgError:  # sums in float32 of inputs that depend on each other
            damping *= 10


def inverse_cholesky(matrix: np.ndarray) -> np.ndarray:
    """The inverse of L, where L L' is the symmetric `matrix`; by halves, so that nearly all of it are products.

    Raises:
      LinAlgError: it is not positive definite.
    """
    if len(matrix) <= CHOLESKY_ROWS:
        return np.asarray(np.tril(np.linalg.inv(np.linalg.cholesky(matrix))))
    half = len(matrix) // 2
    result = np.zeros_like(matrix)
    result[:half, :half] = upper = inverse_cholesky(matrix[:half, :half])
    left = matrix[half:, :half] @ upper.T
    result[half:, half:] = lower = inverse_cholesky(matrix[half:, half:] - left @ left.T)
    result[half:, :half] = -(lower @ (left @ upper))
    return result


def _round(
    values: np.ndarray, factor: np.ndarray, squares: np.ndarray, block: int, largest: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of (k, n) values, which are used up.

    What rounding a row does is taken to the rows of its window at once, to those of its batch behind each window, and
    to all others behind the batch: fewer passes over what does not fit in a cache.
    """
    k, n = values.shape
    codes, scales = np.empty((k, n), np.int8), np.empty((k // block, n), np.float32)
    window = min(block, WINDOW_ROWS)
    errors = np.empty((BATCH_ROWS, n), np.float32)
    for first in range(0, k, BATCH_ROWS):
        last = min(first + BATCH_ROWS, k)
        for start in range(first, last, window):
            if start % block == 0:
                scale = _scale(values[start : start + block], squares[start : start + block], largest)
                scales[start // block] = scale
                inverse = np.float32(1) / scale
            end = start + window
            for row in range(start, end):
                code = np.clip(np.rint(values[row] * inverse), -largest, largest)
                codes[row] = code
                errors[row - first] = error = (values[row] - code * scale) / factor[row, row]
                values[row + 1 : end] -= factor[row, row + 1 : end, None] * error
            values[end:last] -= factor[start:end, end:last].T @ errors[start - first : end - first]
        values[last:] -= factor[first:last, last:].T @ errors[: last - first]
    return codes, scales


def _scale(values: np.ndarray, squares: np.ndarray, largest: np.float32) -> np.ndarray:
    """The scale (n,) of one block (block, n): the one that changes outputs least, each input taken by itself."""
    widest = np.abs(values).max(axis=0) / largest
    widest[widest < np.finfo(np.float32).tiny] = 1
    best, best_error = widest, np.full(len(widest), np.inf, np.float32)
    weights = (squares + np.float32(DAMPING) * squares.mean())[None]
    for part in SHRINKING:
        scale = widest * part
        rounded = np.clip(np.rint(values / scale), -largest, largest) * scale
        error = (weights @ np.square(values - rounded))[0]
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    return np.asarray(best, np.float32)

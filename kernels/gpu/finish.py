"""The end of a product: partial sums to the output, with bias, gate and residual.

Owns that order of additions, which is always the same: the splits of K from first to last in groups, so that repeated
runs give the same bits. Knows no weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant

COLUMNS = 128
SPLITS = 8
"""Splits that are read at once: their loads overlap."""


@triton.jit
def silu(x):
    return tl.fdiv(x, 1.0 + tl.exp(-x))


@triton.jit
def sum_of_splits(sums, column, live, bias, bias_width, row_of_split, splits, SPLITS: tl.constexpr):
    """One row's sums (columns) over all splits, with the bias; `sums` points at the row of split 0."""
    total = tl.zeros(column.shape, tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[:, None]
        part = tl.load(sums + split * row_of_split + column[None], (split < splits) & live[None], other=0.0)
        total += tl.sum(part, 0)
    return total + tl.load(bias + column, live & (column < bias_width), other=0.0)


@triton.jit
def finish(
    sums, bias, residual, output, rows, outputs, splits, output_stride, bias_width, residual_width,
    GATED: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """output = activation(sum of sums (splits, rows, outputs) + bias) + residual. Grid: (columns, rows).

    bias_width, residual_width: 0 where there is none.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    width = outputs // 2 if GATED else outputs
    live = column < width
    row_of_split = rows.to(tl.int64) * outputs
    first = sums + row * outputs
    total = sum_of_splits(first, column, live, bias, bias_width, row_of_split, splits, SPLITS)
    if GATED:
        up = sum_of_splits(first, width + column, live, bias, bias_width, row_of_split, splits, SPLITS)
        total = silu(total) * up
    place = row * output_stride + column
    total += tl.load(residual + place, live & (column < residual_width), other=0.0)
    tl.store(output + place, total, live)


def variants() -> list[Variant]:
    """With and without a gate. Nothing is known of the bias's and the residual's addresses: they may be NULL."""
    signature = {"sums": "*fp32", "bias": "*fp32", "residual": "*fp32", "output": "*fp32", "rows": "i32",
                 "outputs": "i32", "splits": "i32", "output_stride": "i64", "bias_width": "i32",
                 "residual_width": "i32"}  # fmt: skip
    return [
        Variant(f"finish{'_gated' if gated else ''}", finish, signature,
                {"GATED": gated, "COLUMNS": COLUMNS, "SPLITS": SPLITS}, num_warps=4)
        for gated in (False, True)
    ]  # fmt: skip

"""GPU kernels that only tests use: one that is right, and some with the faults that tests must find."""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant, Work


@triton.jit
def scaled_sum(x, y, out, count, offset, factor, BLOCK: tl.constexpr):
    """out[i] = x[i] * factor + y[i] + offset."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    both = tl.load(x + at, inside) * factor + tl.load(y + at, inside).to(tl.float32)
    tl.store(out + at, both + offset.to(tl.float32), inside)


@triton.jit
def without_mask(x, out, BLOCK: tl.constexpr):
    """Reads and writes whole blocks, whatever the arrays' size."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def racing(x, out, BLOCK: tl.constexpr):
    """Every program writes the same place."""
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def spilling(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keeps more than the registers hold."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = rows[:, None] * COLUMNS + columns[None]
    tile = tl.load(x + at)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(2):
        total += tile * step + tl.sum(total, 0)[None]
    tl.store(out + at, total * tile)


def variants() -> list[Variant]:
    return [
        Variant(
            "scaled_sum_64",
            scaled_sum,
            {"x": "*fp32", "y": "*i8", "out": "*fp32", "count": "i32", "offset": "i64", "factor": "fp32"},
            {"BLOCK": 64},
            num_warps=2,
        ),
        Variant("without_mask_64", without_mask, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 64}, num_warps=1),
        Variant("racing_64", racing, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 64}, num_warps=1),
    ]


def spilling_variants() -> list[Variant]:
    """Apart from the others: a build refuses them."""
    return [
        Variant("spilling", spilling, {"x": "*fp32", "out": "*fp32"}, {"ROWS": 64, "COLUMNS": 128}, num_warps=1),
    ]


def work() -> list[Work]:
    return [Work("scaled_sum_64", "one million numbers", 9_000_000, fp32_ops=3_000_000, programs=15_625)]

"""Rows of activations as products with several rows take them: float16, with scales that keep everything in range.

Owns what is rounded and how; no product. Two forms, both float16 numbers (rows, pitch) that scales complete:
  by row: x / 2^e, the row's largest number between 2^14 and 2^15; e is the row's. Nothing overflows, however large.
  by block: the 8-bit codes of the CPU kernels, one scale for each row and block (max|x| / 127, half to even).
A row with a number that is not finite gets scales that are NaN, so that it spoils itself and no other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant

COLUMNS = 1024
WIDEST_BLOCK = 256
BLOCKS = 4
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds a float32 to an integer, halves to even."""
SMALLEST_BLOCK_MAX: tl.constexpr = tl.constexpr(1e-36)
"""Below this a block counts as zeros, as on the CPU: 127 / max would not be a float any more."""
INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x):
    """|x| as integers, which order as the numbers do, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rows_by_row(input, output, scales, inputs, stride, pitch, COLUMNS: tl.constexpr):
    """output (rows, pitch) float16 and scales (rows) of input (rows, inputs). Grid: (rows)."""
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    source = input + row * stride
    largest = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, inputs, COLUMNS):
        live = start + column < inputs
        largest = tl.maximum(largest, magnitude_bits(tl.load(source + start + column, live, other=0.0)))
    bits = tl.max(largest, 0)
    # The exponent of a power of two near the largest; not so small that its inverse would overflow.
    exponent = tl.maximum(bits >> 23, 27) - 14
    scale = as_float(exponent << 23)
    inverse = as_float((254 - exponent) << 23)
    finite = bits < INFINITY_BITS
    tl.store(scales + row, tl.where(finite, scale, float("nan")))
    target = output + row.to(tl.int64) * pitch
    filled = tl.where(finite, inputs, 0)
    for start in range(0, pitch, COLUMNS):
        at = start + column
        x = tl.load(source + at, at < filled, other=0.0)
        tl.store(target + at, (x * inverse).to(tl.float16), at < pitch)


@triton.jit
def rows_by_block(
    input, output, scales, inputs, stride, pitch, block, blocks, BLOCKS: tl.constexpr, WIDEST: tl.constexpr
):
    """output (rows, pitch) float16 codes and scales (rows, blocks). Grid: (rows, blocks / BLOCKS rounded up)."""
    row = tl.program_id(0)
    index = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = tl.arange(0, WIDEST)[None]
    at = index[:, None] * block + inside
    live = (inside < block) & (index < blocks)[:, None]
    x = tl.load(input + row * stride + at, live & (at < inputs), other=0.0)
    bits = tl.max(magnitude_bits(x), 1)
    largest = as_float(bits)
    finite = bits < INFINITY_BITS
    counts = finite & (largest >= SMALLEST_BLOCK_MAX)
    full = tl.full((BLOCKS,), 127.0, tl.float32)
    scale = tl.where(counts, tl.div_rn(largest, full), 0.0)
    inverse = tl.div_rn(full, tl.where(counts, largest, 1.0))
    codes = tl.where(counts[:, None], (x * inverse[:, None] + ROUNDER) - ROUNDER, 0.0)
    tl.store(output + row.to(tl.int64) * pitch + at, codes.to(tl.float16), live & (at < pitch))
    tl.store(scales + row * blocks + index, tl.where(finite, scale, float("nan")), index < blocks)


def variants() -> list[Variant]:
    """One kernel for each form; a product and its rounding are not fused, or codes would not be the CPU's."""
    common = {"input": "*fp32", "output": "*fp16", "scales": "*fp32", "inputs": "i32", "stride": "i64", "pitch": "i32"}
    return [
        Variant("rows_by_row", rows_by_row, common, {"COLUMNS": COLUMNS}, num_warps=4),
        Variant("rows_by_block", rows_by_block, {**common, "block": "i32", "blocks": "i32"},
                {"BLOCKS": BLOCKS, "WIDEST": WIDEST_BLOCK}, num_warps=4, fuse=False),
    ]  # fmt: skip

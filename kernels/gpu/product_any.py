"""Rows times quantised weights of any size: what the fast products leave out.

Owns ragged sizes: columns that do not fill 16 bytes of a row, K and blocks that are no multiple of 32. Reads codes byte
by byte; sums, scales and exactness are those of `product_rows.py`. No layer of a public model comes here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant

ROWS = 16
TILE = 16
COLUMNS = 64


@triton.jit
def product_any(
    input, input_scales, codes, scales, sums, rows, inputs, pitch, outputs, block, scale_stride, tiles_each,
    BITS: tl.constexpr, BY_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (splits, rows, outputs) of each split of K. Grid: (columns, rows, splits).

    Args:
      input: (rows, pitch) float16, zeros from `inputs` on. input_scales: (rows, scale_stride).
      codes: (inputs, outputs) as the bundle stores them. scales: (blocks, outputs). tiles_each: of a split.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_live = row < rows
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < outputs
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(2) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(inputs, TILE))):
        k = tile * TILE + tl.arange(0, TILE)
        exists = (k < inputs)[:, None] & live[None]
        start = k[:, None].to(tl.int64) * outputs
        if BITS == 4:
            byte = tl.load(codes + start // 2 + (column // 2)[None], exists, other=0).to(tl.int32)
            digits = (byte >> (4 * (column % 2))[None]) & 15
            code = (digits ^ 8) - 8
        else:
            byte = tl.load(codes + start + column[None], exists, other=0).to(tl.int32)
            code = (byte ^ 128) - 128
        place = row[:, None].to(tl.int64) * pitch + k[None]
        x = tl.load(input + place, row_live[:, None] & (k < pitch)[None], other=0.0)
        index = tile * TILE // block
        weight_scale = tl.load(scales + index.to(tl.int64) * outputs + column, live, other=0.0)
        input_scale = tl.load(input_scales + row * scale_stride + (index if BY_BLOCK else 0), row_live, other=0.0)
        part = tl.dot(x, code.to(tl.float16), out_dtype=tl.float32)
        total = tl.fma(part, input_scale[:, None] * weight_scale[None], total)
    place = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * outputs + column[None]
    tl.store(sums + place, total, row_live[:, None] & live[None])


def variants() -> list[Variant]:
    """4 and 8 bits, with rows of either form."""
    signature = {"input": "*fp16", "input_scales": "*fp32", "codes": "*u8", "scales": "*fp32", "sums": "*fp32",
                 "rows": "i32", "inputs": "i32", "pitch": "i32", "outputs": "i32", "block": "i32",
                 "scale_stride": "i32", "tiles_each": "i32"}  # fmt: skip
    return [
        Variant(
            f"product_any_w{bits}a{'8' if by_block else '16'}",
            product_any,
            signature,
            {"BITS": bits, "BY_BLOCK": by_block, "ROWS": ROWS, "TILE": TILE, "COLUMNS": COLUMNS},
            num_warps=4,
        )
        for bits in (4, 8)
        for by_block in (False, True)
    ]

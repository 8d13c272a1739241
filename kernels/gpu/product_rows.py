"""Several rows times quantised weights, on tensor cores.

Owns the sums over K in tiles, and the gate where one program does all of K; the rest is `finish.py`'s. Rows come as
`prepare_rows.py` leaves them; weights as the bundle has them.

A tile of codes is turned into float16 in registers (codes.py: under two instructions for a weight) and goes through
shared memory once; every row of a program shares it. Products of a tile are summed in float32 and multiplied by the
tile's scales then: the weights themselves stay exact, and 8-bit rows give exact integers (127 * 127 * 64 < 2^24), equal
to those of integer tensor cores. Integer ones would need four values of K side by side, which lie four rows apart here;
rearranging bytes costs several instructions a weight, where float16 is transposed for nothing while it is loaded.

Tile sizes: 16 rows for a few tokens, 64 for a turn (144 tokens pad to 192). 128 columns: 64 bytes of a row of 4-bit
codes, two sectors of memory, and few enough sums to stay in registers beside a tile's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import column_order, float16_of_words, in_column_order
from .finish import silu
from .product_row import SHAPES
from .variant import Variant, Work

COLUMNS = 128
WARPS = {(16, 32): 2, (16, 64): 4, (64, 32): 8, (64, 64): 8}
"""By rows and tile: enough that sums and codes stay in registers on every generation."""
TILES = (32, 64)
"""Rows of K in a tile: the largest that divides block and K."""


@triton.jit
def columns_of(program, place, outputs, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """The weights' columns at places of a tile: with a gate, a half of gate and the half of up that belongs to it."""
    if GATED:
        half: tl.constexpr = COLUMNS // 2
        column = program * half + place % half
        live = column < outputs // 2
        column += (place // half) * (outputs // 2)
    else:
        column = program * COLUMNS + place
        live = column < outputs
    return column, live


@triton.jit
def words_of(program, quads, BITS: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of a row of codes that hold a tile's columns; all plainly multiples of 4, so copies take 16 bytes."""
    in_tile: tl.constexpr = COLUMNS * BITS // 32
    word = tl.arange(0, in_tile)
    if GATED:
        half: tl.constexpr = in_tile // 2
        words = (quads // 2) * 4
        place = program * half + word % half
        live = place < words
        place += (word // half) * words
    else:
        place = program * in_tile + word
        live = place < quads * 4
    return place, live


@triton.jit
def gate(total, bias, column, outputs, bias_width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * up of a tile's sums, and the output's columns."""
    half: tl.constexpr = COLUMNS // 2
    total += tl.load(bias + column, column < bias_width, other=0.0)[None]
    gates, ups = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, half)), (0, 2, 1)))
    columns, _ = tl.split(tl.permute(tl.reshape(column, (2, half)), (1, 0)))
    return silu(gates) * ups, columns


@triton.jit
def product_rows(
    input, input_scales, codes, scales, sums, bias, rows, pitch, outputs, quads, tiles, tiles_of_block, scale_stride,
    tiles_each, sums_stride, bias_width,
    BITS: tl.constexpr, BY_BLOCK: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (splits, rows, sums_stride) of each split of K. Grid: (columns, rows, splits).

    GATED: one split, and `sums` is the output: silu(gate + bias) * (up + bias).

    Args:
      input: (rows, pitch) float16. input_scales: (rows, scale_stride), of which BY_BLOCK uses a row.
      codes: (K, 4 quads) int32. scales: (blocks, outputs).
      tiles: K / TILE. tiles_of_block: block / TILE. tiles_each: of a split.
    """
    words = quads * 4
    first_row = tl.program_id(1) * ROWS
    row = tl.arange(0, ROWS)
    row_live = first_row + row < rows
    place = tl.arange(0, COLUMNS)
    column, live = columns_of(tl.program_id(0), place, outputs, GATED, COLUMNS)
    word, word_live = words_of(tl.program_id(0), quads, BITS, GATED, COLUMNS)
    k = tl.arange(0, TILE)
    first = tl.program_id(2) * tiles_each
    start = first.to(tl.int64) * TILE
    code = codes + start * words + (k[:, None].to(tl.int64) * words + word[None])
    x = input + start + first_row.to(tl.int64) * pitch + (row[:, None] * pitch + k[None])
    input_scales += first_row * scale_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        block = tile // tiles_of_block
        packed = tl.load(code, word_live[None], other=0)
        values = tl.load(x, row_live[:, None], other=0.0)
        weight_scale = tl.load(scales + block.to(tl.int64) * outputs + column, live, other=0.0)
        weight_scale = in_column_order(weight_scale, BITS)
        part = tl.dot(values, float16_of_words(packed, BITS), out_dtype=tl.float32)
        if BY_BLOCK:
            input_scale = tl.load(input_scales + row * scale_stride + block, row_live, other=0.0)
            total = tl.fma(part, input_scale[:, None] * weight_scale[None], total)
        else:
            total = tl.fma(part, weight_scale[None], total)
        code += TILE * words.to(tl.int64)
        x += TILE
    # From here on columns are where the tile has them.
    column, live = columns_of(tl.program_id(0), column_order(place, BITS), outputs, GATED, COLUMNS)
    if not BY_BLOCK:
        total *= tl.load(input_scales + row, row_live, other=0.0)[:, None]
    if GATED:
        column = tl.where(live, column, 0)
        total, column = gate(total, bias, column, outputs, bias_width, ROWS, COLUMNS)
        live, _ = tl.split(tl.permute(tl.reshape(live, (2, COLUMNS // 2)), (1, 0)))
    sums += (tl.program_id(2).to(tl.int64) * rows + first_row) * sums_stride
    tl.store(sums + (row[:, None] * sums_stride + column[None]), total, row_live[:, None] & live[None])


SIGNATURE = {
    "input": "*fp16", "input_scales": "*fp32", "codes": "*i32", "scales": "*fp32", "sums": "*fp32", "bias": "*fp32",
    "rows": "i32", "pitch": "i32", "outputs": "i32", "quads": "i32", "tiles": "i32", "tiles_of_block": "i32",
    "scale_stride": "i32", "tiles_each": "i32", "sums_stride": "i32", "bias_width": "i32",
}  # fmt: skip


def variants() -> list[Variant]:
    """4 bits by row, 4 and 8 bits by block; every tile, few rows and many, with and without a gate."""
    pointers = tuple(name for name, kind in SIGNATURE.items() if kind.startswith("*"))
    return [
        Variant(
            f"product_rows_w{bits}a{'8' if by_block else '16'}_k{tile}_m{rows}{'_gated' if gated else ''}",
            product_rows,
            SIGNATURE,
            {"BITS": bits, "BY_BLOCK": by_block, "GATED": gated, "ROWS": rows, "TILE": tile, "COLUMNS": COLUMNS},
            num_warps=WARPS[rows, tile],
            num_stages=4 if tile == 32 else 3,
            aligned=(*pointers, "pitch"),
            most_registers=128 if WARPS[rows, tile] == 8 else None,  # for two programs of 256 threads
        )
        for bits, by_block in ((4, False), (4, True), (8, True))
        for tile in TILES
        for rows in (16, 64)
        for gated in (False, True)
    ]


TURN_ROWS = 144
"""Tokens of a turn with a picture of 128 visual tokens."""


def work() -> list[Work]:
    """A turn's rows, 4 bits in blocks of 32; rows pad to whole tiles."""
    padded = -(-TURN_ROWS // 64) * 64
    found = []
    for name, inputs, outputs in SHAPES:
        gated = "gate" in name
        variant = f"product_rows_w4a16_k32_m64{'_gated' if gated else ''}"
        weights = inputs * outputs
        moved = weights // 2 + weights // 8 + TURN_ROWS * (2 * inputs + 4 * outputs // (2 if gated else 1))
        found.append(Work(variant, f"{name}, {TURN_ROWS} rows, blocks of 32", moved,
                          fp16_tensor_ops=2 * padded * weights, fp32_ops=2 * padded * weights // 32))  # fmt: skip
    return found

"""Attention over a float cache: `attend.py` for layers that export left unquantised, with its tables and its splits.

Owns the inner loop for float rows. Products keep float32's precision (tf32x3: three tensor-core products for one), for
the keys of such layers may have a bias of hundreds, whose rounding to 11 bits would drown the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import LOWEST, PARTS, SIZES, TABLE, TILE_ROWS, shares, write_sums
from .variant import Variant


@triton.jit
def attend_to_float_slots(
    queries, slot, here, visible, keys, values, maximum, total, sums, D: tl.constexpr, PRECISION: tl.constexpr
):
    """As `attend_to_slots` for a float cache."""
    rows = slot[:, None] * D + tl.arange(0, D)[None, :]
    key = tl.load(keys + rows, here[:, None], other=0.0)
    value = tl.load(values + rows, here[:, None], other=0.0)
    scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION)
    scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    keep = tl.exp2(maximum - new_maximum)
    weights = tl.exp2(scores - new_maximum[:, None])
    total = tl.fma(total, keep, tl.sum(weights, 1))
    sums = tl.dot(weights, value, sums * keep[:, None], input_precision=PRECISION)
    return new_maximum, total, sums


@triton.jit
def load_float_queries(queries, at, row, rows, D: tl.constexpr):
    offsets = at * D + row[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(queries + offsets, (row < rows)[:, None], other=0.0)


@triton.jit
def attend_f32(
    queries, keys, values,
    header, tiles, new_slots, partial_sums, partial_maximum, partial_total, output,
    rows, group, new_tokens, capacity, run_count, least_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `attend_int8`; the cache holds the values' bias. queries: (R + 1, Hkv, T G, D) float32."""
    head, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(0), tl.num_programs(2)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    token = row // group
    cached, begin, end = shares(header, block, rows, group, split, splits, least_tiles, BLOCK_M, TILE)
    first_row = head.to(tl.int64) * capacity
    keys += first_row * D
    values += first_row * D

    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, D), tl.float32)
    parts: tl.constexpr = TILE // BLOCK_N

    tile, last = begin, tl.minimum(end, cached)
    while tile < last:
        run = tl.load(tiles + tile * 4 + 2)
        stop = tl.minimum(tl.load(tiles + tile * 4 + 3), last)
        query = load_float_queries(queries, (run * kv_heads + head).to(tl.int64) * rows, row, rows, D)
        first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
        for part in range(tile * parts, stop * parts):
            behind = part % parts * BLOCK_N + n
            here = behind < count
            base = first.to(tl.int64) * D
            maximum, total, sums = attend_to_float_slots(
                query, behind, here, here[None, :], keys + base, values + base, maximum, total, sums, D, PRECISION
            )
            first, count = tl.load(tiles + (part + 1) // parts * 4), tl.load(tiles + (part + 1) // parts * 4 + 1)
        tile = stop

    if end > cached:
        query = load_float_queries(queries, (run_count * kv_heads + head).to(tl.int64) * rows, row, rows, D)
        for part in tl.range(tl.maximum(begin - cached, 0) * parts, (end - cached) * parts, num_stages=1):
            index = part * BLOCK_N + n
            here = index < new_tokens
            slot = tl.load(new_slots + index, here, other=0).to(tl.int64)
            maximum, total, sums = attend_to_float_slots(
                query, slot, here, index[None, :] <= token[:, None], keys, values, maximum, total, sums, D, PRECISION
            )

    write_sums(
        partial_sums, partial_maximum, partial_total, output, output, 0, maximum, total, sums,
        end > begin, head, kv_heads, split, splits, row, rows, group, D,
    )  # fmt: skip


F32_SIGNATURE = {"queries": "*fp32", "keys": "*fp32", "values": "*fp32", **TABLE, **PARTS, **SIZES}


def variants() -> list[Variant]:
    """Rows of 512 bytes take 4 times the shared memory of codes: half tiles, two under way, and fewer query rows."""
    found = []
    for width in (64, 128):
        for rows, warps in ((16, 4), (32, 8)):
            sizes = {"D": width, "BLOCK_M": rows, "BLOCK_N": 32, "TILE": TILE_ROWS, "PRECISION": "tf32x3"}
            found.append(
                Variant(f"attend_f32_d{width}_m{rows}", attend_f32, F32_SIGNATURE, sizes, warps, 2, fuse=False)
            )
    return found

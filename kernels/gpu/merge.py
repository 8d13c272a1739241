"""Joins the splits of an attention call, in a fixed order, and adds the values' bias: one program for each query row.

Owns nothing of the cache; the parts' layout is said in `attend.py`. No atomics: the same parts give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant, Work


@triton.jit
def merge(
    partial_sums, partial_maximum, partial_total, output, value_bias, rows, group, splits, has_bias,
    D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (T G, Hkv). A split with a total of 0 saw nothing: neither its maximum nor its sums are looked at."""
    row, head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    step = kv_heads.to(tl.int64) * rows
    first = head.to(tl.int64) * rows + row

    highest = tl.full((BLOCK_S,), -1.0e30, tl.float32)
    for split in range(0, splits, BLOCK_S):
        at = first + (split + s) * step
        total = tl.load(partial_total + at, split + s < splits, other=0.0)
        highest = tl.maximum(highest, tl.load(partial_maximum + at, total > 0, other=-1.0e30))
    maximum = tl.max(highest, 0)

    sums = tl.zeros((BLOCK_S, D), tl.float32)
    totals = tl.zeros((BLOCK_S,), tl.float32)
    for split in range(0, splits, BLOCK_S):
        at = first + (split + s) * step
        total = tl.load(partial_total + at, split + s < splits, other=0.0)
        factor = tl.exp2(tl.load(partial_maximum + at, total > 0, other=-1.0e30) - maximum)
        parts = tl.load(partial_sums + at[:, None] * D + d[None, :], (total > 0)[:, None], other=0.0)
        sums = tl.fma(parts, tl.broadcast_to(factor[:, None], parts.shape), sums)
        totals = tl.fma(total, factor, totals)
    result = tl.sum(sums, 0) / tl.sum(totals, 0)
    if has_bias != 0:
        result += tl.load(value_bias + head * D + d)
    query_head = (row // group).to(tl.int64) * (kv_heads * group) + head * group + row % group
    tl.store(output + query_head * D + d, result)


SIGNATURE = {
    "partial_sums": "*fp32",
    "partial_maximum": "*fp32",
    "partial_total": "*fp32",
    "output": "*fp32",
    "value_bias": "*fp32",
    "rows": "i32",
    "group": "i32",
    "splits": "i32",
    "has_bias": "i32",
}


def variants() -> list[Variant]:
    """4 splits at a time for appends, which have few; 32 for decode steps, which may have one for each processor."""
    return [
        Variant(f"merge_d{width}_s{splits}", merge, SIGNATURE, {"D": width, "BLOCK_S": splits}, warps, fuse=False)
        for width in (64, 128)
        for splits, warps in ((4, 1), (32, 4))
    ]


def work() -> list[Work]:
    """3B, one token, as many splits as an H200 gets: 132."""
    return [
        Work(
            "merge_d128_s32",
            "3B, 1 token, 132 splits",
            132 * 16 * (128 + 2) * 4,
            fp32_ops=132 * 16 * 128 * 2,
            programs=16,
        )
    ]

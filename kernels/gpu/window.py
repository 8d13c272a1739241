"""Attention inside the windows of a vision tower: bidirectional, a block of rows of one window for each program.

Owns rotation and softmax of the windows' rows. Rows are rounded to float16 for the tensor cores, each scaled by the
power of two that brings its largest element below 1, so that none overflows; the exponents of queries and keys go back
into the scores, those of values into the weights, as `attend.py` says. Halves of 40 are
padded to 64 in the scores; nothing is read or stored for the padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant, Work

LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
HEADROOM: tl.constexpr = tl.constexpr(14.0)


@triton.jit
def exponent_above(largest):
    """Of the least power of two above `largest` (float), and that power's inverse; 0 and what is below 2^-96 take 0."""
    biased = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(biased > 30, tl.minimum(biased - 126, 126), 0)
    return exponent.to(tl.float32), ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def turned_rows(qkv, rope_cos, rope_sin, row, here, part, head, heads, D: tl.constexpr, HALF: tl.constexpr):
    """Queries (part 0) or keys (part 1) turned: two halves (N, HALF) float16, scaled; and 2^exponent of each row."""
    d = tl.arange(0, HALF)
    mask = here[:, None] & (d < D // 2)[None, :]
    first = row.to(tl.int64)[:, None] * (3 * heads * D) + ((part * heads + head) * D + d)[None, :]
    low = tl.load(qkv + first, mask, other=0.0)
    high = tl.load(qkv + first + D // 2, mask, other=0.0)
    angles = row[:, None] * (D // 2) + d[None, :]
    cos, sin = tl.load(rope_cos + angles, mask, other=0.0), tl.load(rope_sin + angles, mask, other=0.0)
    turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
    largest = tl.maximum(tl.max(tl.abs(turned_low), 1), tl.max(tl.abs(turned_high), 1))
    exponent, inverse = exponent_above(largest)
    return (
        (turned_low * inverse[:, None]).to(tl.float16),
        (turned_high * inverse[:, None]).to(tl.float16),
        tl.exp2(exponent),
    )


@triton.jit
def window_attention(
    qkv, rope_cos, rope_sin, starts, output, heads, factor,
    D: tl.constexpr, HALF: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (heads, windows, blocks of the largest window). qkv: (P, 3, heads, D); rope_cos, rope_sin: (P, D/2); output:
    (P, heads, D); starts: (windows + 1) int32.

    factor: the scores' scale times log2(e). Columns of values and output are done as LEFT + RIGHT: two powers of two
    need no padding at 80, and at most 64 columns keep each row's softmax inside a warp.
    """
    head, window, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    keys_first = tl.load(starts + window)
    keys_count = tl.load(starts + window + 1) - keys_first
    first, count = keys_first + block * BLOCK_M, keys_count - block * BLOCK_M
    if count <= 0:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, LEFT), LEFT + tl.arange(0, RIGHT)
    query_low, query_high, query_scale = turned_rows(
        qkv, rope_cos, rope_sin, first + m, m < count, 0, head, heads, D, HALF
    )
    query_scale *= factor

    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    left = tl.zeros((BLOCK_M, LEFT), tl.float32)
    right = tl.zeros((BLOCK_M, RIGHT), tl.float32)
    for start in range(0, keys_count, BLOCK_N):
        here = start + n < keys_count
        row = keys_first + start + n
        key_low, key_high, key_scale = turned_rows(qkv, rope_cos, rope_sin, row, here, 1, head, heads, D, HALF)
        values = qkv + row.to(tl.int64)[:, None] * (3 * heads * D) + (2 * heads + head) * D
        left_value = tl.load(values + d[None, :], here[:, None], other=0.0)
        right_value = tl.load(values + e[None, :], here[:, None], other=0.0)
        largest = tl.maximum(tl.max(tl.abs(left_value), 1), tl.max(tl.abs(right_value), 1))
        exponent, inverse = exponent_above(largest)
        scores = tl.dot(query_low, tl.trans(key_low))
        scores = tl.dot(query_high, tl.trans(key_high), scores) * query_scale[:, None]
        scores = tl.fma(
            scores, tl.broadcast_to(key_scale[None, :], scores.shape), tl.broadcast_to(exponent[None, :], scores.shape)
        )
        scores = tl.where(here[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        keep = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - (new_maximum - HEADROOM)[:, None])
        total = tl.fma(total, keep, tl.sum(weights * inverse[None, :], 1))
        weighted = weights.to(tl.float16)
        left = tl.dot(weighted, (left_value * inverse[:, None]).to(tl.float16), left * keep[:, None])
        right = tl.dot(weighted, (right_value * inverse[:, None]).to(tl.float16), right * keep[:, None])
        maximum = new_maximum

    divisor = tl.where(total > 0, total, 1.0)[:, None]
    rows = output + (first + m).to(tl.int64)[:, None] * (heads * D) + head * D
    tl.store(rows + d[None, :], left / divisor, (m < count)[:, None])
    tl.store(rows + e[None, :], right / divisor, (m < count)[:, None])


SIGNATURE = {
    "qkv": "*fp32", "rope_cos": "*fp32", "rope_sin": "*fp32", "starts": "*i32", "output": "*fp32", "heads": "i32",
    "factor": "fp32",
}  # fmt: skip


def variants() -> list[Variant]:
    """Windows of Qwen2.5-VL have at most 64 rows: one program for a head of a window, its keys turned once. Where one
    window is all rows, each block of 64 turns the keys again; that is a hundredth of its products' work. Rows go
    through registers, to be turned and scaled, so there is nothing for a pipeline of copies to do."""
    found = []
    for width, left in ((32, 16), (64, 32), (80, 64), (128, 64)):
        half = max(16, triton.next_power_of_2(width // 2))
        sizes = {"D": width, "HALF": half, "LEFT": left, "RIGHT": width - left, "BLOCK_M": 64, "BLOCK_N": 32}
        found.append(Variant(f"window_attention_d{width}", window_attention, SIGNATURE, sizes, 4, 1, fuse=False))
    return found


def work() -> list[Work]:
    """3B's vision tower: 16 heads of 80, 480 rows, windows of 64 and one of all."""
    traffic, products = 480 * 4 * 16 * 80 * 4 + 480 * 80 * 4, 480 * 16 * 2 * 2 * 128
    return [
        Work("window_attention_d80", "480 rows, windows of 64", traffic, fp16_tensor_ops=products * 64, programs=128),
        Work("window_attention_d80", "480 rows, one window", traffic, fp16_tensor_ops=products * 480, programs=128),
    ]

"""One row times quantised weights: reads each weight once, and is meant to be as fast as memory gives them.

Owns the sums of one row over parts of K; bias, gate and residual are `finish.py`'s. Weights of a bundle lie with the
columns of one K side by side, so a thread takes 16 bytes of a row and a quarter of a warp 128 bytes; each thread stays
in a segment of 32 rows of K, so that sums over K are additions in registers, without shared memory or barriers. A
product too small to fill the device takes segments of 16: twice the threads, each of which waits half as often.

Why not tensor cores: they want two values of K in one register, which lie rows apart here. Bringing them together goes
through shared memory, 2 bytes in and 2 out for each weight, more than it can pass at the rate of an H200's memory. The
ordinary units need about 3.1 instructions for a 4-bit weight and 4.5 for an 8-bit one, the loads included.

4 bits: the digits are put under the exponent of 1.0, so that one bitwise instruction and one multiply-add serve a
weight; the sum of the inputs, the same for all columns, takes the ones off again. The input stays float32.
QUANTISE: the input is rounded to 8 bits by block as on the CPU; the sums of a segment are then exact integers.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from .codes import float32_near_one, float32_one
from .variant import Variant, Work

SEGMENTS = (16, 32)
WORDS = 32
"""Words of a row that a program takes: 128 bytes, a line of the cache."""
K_AT_ONCE = 256
"""Rows of K that a program works on at once; each thread has 4 words of a segment's."""
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds a float32 to an integer, halves to even."""
SMALLEST_BLOCK_MAX: tl.constexpr = tl.constexpr(1e-36)
"""Below this a block counts as zeros, as on the CPU: 127 / max would not be a float any more."""


@triton.jit
def block_scale(values, live, largest):
    """The largest |x| so far; NaN where something is not finite."""
    size = tl.where(live, tl.abs(values), 0.0)
    size = tl.where(size < float("inf"), size, float("nan"))
    return tl.maximum(largest, tl.max(size, 1, keep_dims=True), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_row(words, value, one, sums, BITS: tl.constexpr):
    """Add one row of K to the sums of its columns: (1 + digits) times the input."""
    s0, s1, s2, s3, s4, s5, s6, s7 = sums
    if BITS == 4:
        words = words ^ -2004318072  # 0x88888888
        s0 = tl.fma(float32_near_one(words, one, 11, 11, 4), value, s0)
        s1 = tl.fma(float32_near_one(words, one, 11, 15, 4), value, s1)
        s2 = tl.fma(float32_near_one(words, one, 11, 19, 4), value, s2)
        s3 = tl.fma(float32_near_one(words, one, -1, 11, 4), value, s3)
        s4 = tl.fma(float32_near_one(words, one, -1, 15, 4), value, s4)
        s5 = tl.fma(float32_near_one(words, one, -1, 19, 4), value, s5)
        s6 = tl.fma(float32_near_one(words, one, -13, 11, 4), value, s6)
        s7 = tl.fma(float32_near_one(words, one, -13, 15, 4), value, s7)
    else:
        words = words ^ -2139062144  # 0x80808080
        s0 = tl.fma(float32_near_one(words, one, 15, 15, 8), value, s0)
        s1 = tl.fma(float32_near_one(words, one, 7, 15, 8), value, s1)
        s2 = tl.fma(float32_near_one(words, one, -1, 15, 8), value, s2)
        s3 = tl.fma(float32_near_one(words, one, -9, 15, 8), value, s3)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def take_value(x, inside, scale_to_codes, QUANTISE: tl.constexpr):
    """The input of one K for each segment, rounded to codes if so wanted."""
    value = tl.load(x, inside, other=0.0)
    if QUANTISE:
        value = (value * scale_to_codes + ROUNDER) - ROUNDER  # two roundings, as on the CPU
    return value


@triton.jit
def product_row(
    input, codes, scales, sums, segments, outputs, quads, block, per_segment, segments_each,
    BITS: tl.constexpr, QUANTISE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """sums[split, column] = input . weights over the split's segments. Grid: (columns, splits).

    Args:
      input: (K) float32. codes: (K, 4 quads) int32. scales: (K / block, outputs). sums: (splits, outputs).
      segments: K / SEGMENT. quads: 16-byte pieces in a row of codes. block: along K, a multiple of SEGMENT.
      per_segment: SEGMENT / block, by which segments become blocks without a division of integers.
      segments_each: of a split, a multiple of ROWS.
    """
    COLUMNS: tl.constexpr = 32 // BITS
    words = quads * 4
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    exists = (word < words)[None]
    one = float32_one(segments)
    nothing = tl.zeros((ROWS, WORDS), tl.float32)
    total_0 = nothing
    total_1 = nothing
    total_2 = nothing
    total_3 = nothing
    total_4 = nothing
    total_5 = nothing
    total_6 = nothing
    total_7 = nothing
    first = tl.program_id(1) * segments_each
    last = tl.minimum(first + segments_each, segments)
    # Weights are loaded four rows ahead of their use, across the border of a segment too: with 12 warps to a
    # multiprocessor some 24 KiB are then on their way at any time, which is what the latency of the memory asks for.
    place = (tl.arange(0, ROWS) * SEGMENT)[:, None].to(tl.int64) * words + word[None]
    row = words.to(tl.int64)
    segment_jump = (ROWS - 1) * SEGMENT * row
    ahead = codes + first * SEGMENT * row
    mask = exists & (first + tl.arange(0, ROWS)[:, None] < last)
    w0 = tl.load(ahead + place, mask, other=0)
    w1 = tl.load(ahead + row + place, mask, other=0)
    w2 = tl.load(ahead + 2 * row + place, mask, other=0)
    w3 = tl.load(ahead + 3 * row + place, mask, other=0)
    ahead += 4 * row
    for step in range(first, last, ROWS):
        segment = step + tl.arange(0, ROWS)[:, None]
        inside = segment < last
        k = segment * SEGMENT
        block_index = ((segment.to(tl.float32) + 0.5) * per_segment).to(tl.int32)
        x = input + k
        if QUANTISE:
            largest = tl.zeros((ROWS, 1), tl.float32)
            offset = tl.arange(0, SEGMENT)[None]
            for start in range(0, block, SEGMENT):
                at = block_index * block + start + offset
                live = inside & (at < segments * SEGMENT)
                largest = block_scale(tl.load(input + at, live, other=0.0), live, largest)
            empty = largest < SMALLEST_BLOCK_MAX
            scale = tl.div_rn(tl.where(empty, 0.0, largest), tl.full((ROWS, 1), 127.0, tl.float32))
            inverse = tl.where(empty, 0.0, tl.div_rn(tl.full((ROWS, 1), 127.0, tl.float32), largest))
        else:
            inverse = tl.full((ROWS, 1), 1.0, tl.float32)
        sum_x = tl.zeros((ROWS, 1), tl.float32)
        a = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
        for i in range(0, SEGMENT, 4):
            leaves = tl.where(i == SEGMENT - 4, 1, 0)  # the rows ahead are the next segment's
            ahead += leaves.to(tl.int64) * segment_jump
            mask = exists & (segment < last - leaves * ROWS)
            n0 = tl.load(ahead + place, mask, other=0)
            n1 = tl.load(ahead + row + place, mask, other=0)
            n2 = tl.load(ahead + 2 * row + place, mask, other=0)
            n3 = tl.load(ahead + 3 * row + place, mask, other=0)
            ahead += 4 * row
            x0 = take_value(x + i, inside, inverse, QUANTISE)
            x1 = take_value(x + i + 1, inside, inverse, QUANTISE)
            x2 = take_value(x + i + 2, inside, inverse, QUANTISE)
            x3 = take_value(x + i + 3, inside, inverse, QUANTISE)
            sum_x += (x0 + x1) + (x2 + x3)
            a = add_row(w0, x0, one, a, BITS)
            a = add_row(w1, x1, one, a, BITS)
            a = add_row(w2, x2, one, a, BITS)
            a = add_row(w3, x3, one, a, BITS)
            w0 = n0
            w1 = n1
            w2 = n2
            w3 = n3
        a0, a1, a2, a3, a4, a5, a6, a7 = a
        # Digits at POSITION count 2^(POSITION - 23): take off the ones and the zero point, and give them their weight.
        column = tl.program_id(0) * (WORDS * COLUMNS) + tl.arange(0, WORDS * COLUMNS)[None]
        s = scales + block_index.to(tl.int64) * outputs + column
        step_scales = tl.load(s, inside & (column < outputs), other=0.0)
        if QUANTISE:
            step_scales = step_scales * scale
        if BITS == 4:
            even, odd = tl.split(tl.reshape(step_scales, (ROWS, WORDS, 4, 2)))
            s04, s26 = tl.split(tl.reshape(even, (ROWS, WORDS, 2, 2)))
            s15, s37 = tl.split(tl.reshape(odd, (ROWS, WORDS, 2, 2)))
            s0, s4 = tl.split(s04)
            s1, s5 = tl.split(s15)
            s2, s6 = tl.split(s26)
            s3, s7 = tl.split(s37)
            total_0 = tl.fma(tl.fma(a0, 4096.0, sum_x * -4104.0), s0, total_0)
            total_1 = tl.fma(tl.fma(a1, 256.0, sum_x * -264.0), s1, total_1)
            total_2 = tl.fma(tl.fma(a2, 16.0, sum_x * -24.0), s2, total_2)
            total_3 = tl.fma(tl.fma(a3, 4096.0, sum_x * -4104.0), s3, total_3)
            total_4 = tl.fma(tl.fma(a4, 256.0, sum_x * -264.0), s4, total_4)
            total_5 = tl.fma(tl.fma(a5, 16.0, sum_x * -24.0), s5, total_5)
            total_6 = tl.fma(tl.fma(a6, 4096.0, sum_x * -4104.0), s6, total_6)
            total_7 = tl.fma(tl.fma(a7, 256.0, sum_x * -264.0), s7, total_7)
        else:
            even, odd = tl.split(tl.reshape(step_scales, (ROWS, WORDS, 2, 2)))
            s0, s2 = tl.split(even)
            s1, s3 = tl.split(odd)
            total_0 = tl.fma(tl.fma(a0, 256.0, sum_x * -384.0), s0, total_0)
            total_1 = tl.fma(tl.fma(a1, 256.0, sum_x * -384.0), s1, total_1)
            total_2 = tl.fma(tl.fma(a2, 256.0, sum_x * -384.0), s2, total_2)
            total_3 = tl.fma(tl.fma(a3, 256.0, sum_x * -384.0), s3, total_3)
    target = sums + tl.program_id(1).to(tl.int64) * outputs + word * COLUMNS
    exists_word = word < words
    tl.store(target, tl.sum(total_0, 0), exists_word)
    tl.store(target + 1, tl.sum(total_1, 0), exists_word)
    tl.store(target + 2, tl.sum(total_2, 0), exists_word)
    tl.store(target + 3, tl.sum(total_3, 0), exists_word)
    if BITS == 4:
        tl.store(target + 4, tl.sum(total_4, 0), exists_word)
        tl.store(target + 5, tl.sum(total_5, 0), exists_word)
        tl.store(target + 6, tl.sum(total_6, 0), exists_word)
        tl.store(target + 7, tl.sum(total_7, 0), exists_word)


def variants() -> list[Variant]:
    """Both widths of codes and segments, with the input as it is or rounded to 8 bits. Nothing is fused but what
    `tl.fma` says, so that codes are the CPU's."""
    signature = {"input": "*fp32", "codes": "*i32", "scales": "*fp32", "sums": "*fp32", "segments": "i32",
                 "outputs": "i32", "quads": "i32", "block": "i32", "per_segment": "fp32",
                 "segments_each": "i32"}  # fmt: skip
    found = []
    for bits, quantise, segment in itertools.product((4, 8), (False, True), SEGMENTS):
        rows = K_AT_ONCE // segment
        sizes = {"BITS": bits, "QUANTISE": quantise, "SEGMENT": segment, "ROWS": rows, "WORDS": WORDS}
        name = f"product_row_w{bits}a{'8' if quantise else '32'}_s{segment}"
        warps = rows * WORDS // 4 // 32
        registers = 168 if bits == 4 else None  # for 12 warps; 8 bits need fewer
        found.append(
            Variant(name, product_row, signature, sizes, warps, num_stages=1, fuse=False, most_registers=registers)
        )
    return found


SHAPES = (("3B gate and up", 2048, 22016), ("3B down", 11008, 2048), ("3B qkv", 2048, 2560), ("3B output", 2048, 2048),
          ("7B gate and up", 3584, 37888), ("7B down", 18944, 3584))  # fmt: skip
"""Products of the public models: name, K, N."""


def work() -> list[Work]:
    """One row, 4 bits in blocks of 32 as exported and of 128, and the 3B's head in 8 bits."""

    def one(name: str, inputs: int, outputs: int, bits: int, block: int) -> Work:
        weights = inputs * outputs
        moved = weights * bits // 8 + 4 * weights // block + 4 * (inputs + outputs)
        # Instructions count as two operations, as a multiply-add does: 3.1 for a 4-bit weight, 4.5 for an 8-bit one.
        cost = 6.2 if bits == 4 else 9.0
        variant = "product_row_w4a32_s32" if bits == 4 else "product_row_w8a8_s32"
        return Work(variant, f"{name}, one row, blocks of {block}", moved, fp32_ops=round(cost * weights))

    found = [one(name, k, n, 4, block) for name, k, n in SHAPES for block in (32, 128)]
    return [*found, one("3B head", 2048, 151936, 8, 32)]

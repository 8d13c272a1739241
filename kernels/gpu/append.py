"""The new tokens of an attention call: bias, rotation, offset removal, quantisation, and their rows of the caches.

Owns what a cache row holds, bit for bit as the CPU kernels write it, and what a query is for each run. The queries of
every run go to the workspace, so that attention over cached rows turns nothing: with G query heads for each KV head,
row t G + g of KV head h is head h G + g of token t, and the queries of run r lie at (r, h, row). Run R, one past the
last, is not turned further; the new tokens attend to each other with it.

Exactness: sums and products are rounded one by one (the variants forbid the compiler to fuse them), and codes come from
true divisions, so cached codes and scales equal those of the CPU kernels in every bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant, Work

LARGEST_CODE: tl.constexpr = tl.constexpr(127.0)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds a float32 below 2^22 to an integer, halves to even."""


@triton.jit
def turn(low, high, cos, sin):
    """Rows in two halves, element i paired with element i + D/2, turned."""
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def largest_of(low, high):
    """max|x| of each row given in two halves."""
    return tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))


@triton.jit
def to_codes(x, divisor):
    quotient = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    rounded = (quotient + ROUNDER) - ROUNDER
    return tl.minimum(tl.maximum(rounded, -LARGEST_CODE), LARGEST_CODE)


@triton.jit
def quantise(low, high):
    """Codes as floats, in two halves, and the scale of each row; a row of zeros has scale 0."""
    largest = largest_of(low, high)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST_CODE, tl.float32))
    divisor = tl.where(scale > 0, scale, 1.0)
    return to_codes(low, divisor), to_codes(high, divisor), scale


@triton.jit
def load_halves(pointer, offsets, half: tl.constexpr, mask):
    return tl.load(pointer + offsets, mask, other=0.0), tl.load(pointer + offsets + half, mask, other=0.0)


@triton.jit
def store_halves(pointer, offsets, half: tl.constexpr, low, high, mask):
    kind = pointer.dtype.element_ty
    tl.store(pointer + offsets, low.to(kind), mask)
    tl.store(pointer + offsets + half, high.to(kind), mask)


@triton.jit
def biased_rows(qkv, qkv_bias, token, head, heads, has_bias, mask, D: tl.constexpr):
    """Rows of one head of qkv with its bias, in two halves (BLOCK_T, D/2)."""
    d = tl.arange(0, D // 2)
    offsets = token.to(tl.int64)[:, None] * (heads * D) + (head * D + d)[None, :]
    low, high = load_halves(qkv, offsets, D // 2, mask)
    if has_bias != 0:
        low += tl.load(qkv_bias + head * D + d)[None, :]
        high += tl.load(qkv_bias + head * D + D // 2 + d)[None, :]
    return low, high


@triton.jit
def rope_angles(rope_cos, rope_sin, token, mask, D: tl.constexpr):
    offsets = token[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    return tl.load(rope_cos + offsets, mask, other=0.0), tl.load(rope_sin + offsets, mask, other=0.0)


@triton.jit
def turned_queries(
    qkv, qkv_bias, rope_cos, rope_sin, run_cos, run_sin, token, head, heads, run, run_count, factor, has_bias, mask,
    D: tl.constexpr,
):  # fmt: skip
    """Queries of one head, turned to their own place and then by the run's shift, times `factor`."""
    low, high = biased_rows(qkv, qkv_bias, token, head, heads, has_bias, mask, D)
    cos, sin = rope_angles(rope_cos, rope_sin, token, mask, D)
    low, high = turn(low, high, cos, sin)
    if run < run_count:
        d = run * (D // 2) + tl.arange(0, D // 2)
        low, high = turn(low, high, tl.load(run_cos + d)[None, :], tl.load(run_sin + d)[None, :])
    return low * factor, high * factor


@triton.jit
def write_offset_factors(low, high, key_offset, factors, factor_scales, row, kv_head, mask, here, D: tl.constexpr):
    """What the score owes to the keys' offset is linear in a cached row's cosines and sines: with a query pair (a, b)
    and an offset pair (c, d), cos (a c + b d) + sin (b c - a d). The factors are kept as a sum of two float16, relative
    to the row's largest: 22 bits, and three tensor-core products give the sum to that."""
    d = tl.arange(0, D // 2)
    first = tl.load(key_offset + kv_head * D + d)[None, :]
    second = tl.load(key_offset + kv_head * D + D // 2 + d)[None, :]
    of_cosines, of_sines = low * first + high * second, high * first - low * second
    largest = largest_of(of_cosines, of_sines)
    divisor = tl.where(largest > 0, largest, 1.0)[:, None]
    of_cosines, of_sines = of_cosines / divisor, of_sines / divisor
    coarse_cosines, coarse_sines = of_cosines.to(tl.float16), of_sines.to(tl.float16)
    offsets = row[:, None] * (2 * D) + d[None, :]
    store_halves(factors, offsets, D // 2, coarse_cosines, coarse_sines, mask)
    fine_cosines, fine_sines = of_cosines - coarse_cosines.to(tl.float32), of_sines - coarse_sines.to(tl.float32)
    store_halves(factors, offsets + D, D // 2, fine_cosines, fine_sines, mask)
    tl.store(factor_scales + row, largest, here)


@triton.jit
def query_rows(token, head, run, query_heads, kv_heads, new_tokens):
    """Of a head's queries in one run: the KV head that they look at, and their rows (T,) of (R + 1, Hkv, T G)."""
    group = query_heads // kv_heads
    kv_head = head // group
    return kv_head, (run * kv_heads + kv_head).to(tl.int64) * (new_tokens * group) + token * group + head % group


@triton.jit
def append_int8(
    qkv, qkv_bias, rope_cos, rope_sin, run_cos, run_sin, key_offset, new_slots,
    keys, values, key_scales, value_scales,
    codes, code_scales, remainders, remainder_scales, factors, factor_scales,
    new_tokens, query_heads, kv_heads, capacity, run_count, factor, has_bias,
    D: tl.constexpr, BLOCK_T: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / BLOCK_T), Hq + 2 Hkv, R + 1); heads after the queries' are done at run 0 only.

    keys, values: (Hkv, C, D) int8; key_scales, value_scales: (Hkv, C).
    codes: (R + 1, Hkv, T G, D) int8; code_scales: (R + 1, Hkv, T G).
    With OFFSET: remainders and their scales as codes, what rounding took from the queries; factors: (R + 1, Hkv, T G, 4
    halves of D) float16, coarse ones of cosines and sines, then fine ones; factor_scales as code_scales.
    """
    head, run = tl.program_id(1), tl.program_id(2)
    heads = query_heads + 2 * kv_heads
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, D // 2)
    mask = (token < new_tokens)[:, None] & (d >= 0)[None, :]
    if head < query_heads:
        low, high = turned_queries(
            qkv, qkv_bias, rope_cos, rope_sin, run_cos, run_sin, token, head, heads, run, run_count, factor, has_bias,
            mask, D,
        )  # fmt: skip
        kv_head, row = query_rows(token, head, run, query_heads, kv_heads, new_tokens)
        offsets = row[:, None] * D + d[None, :]
        low_codes, high_codes, scale = quantise(low, high)
        store_halves(codes, offsets, D // 2, low_codes, high_codes, mask)
        tl.store(code_scales + row, scale, token < new_tokens)
        if OFFSET:
            low_lost, high_lost = low - low_codes * scale[:, None], high - high_codes * scale[:, None]
            low_codes, high_codes, scale = quantise(low_lost, high_lost)
            store_halves(remainders, offsets, D // 2, low_codes, high_codes, mask)
            tl.store(remainder_scales + row, scale, token < new_tokens)
            write_offset_factors(
                low, high, key_offset, factors, factor_scales, row, kv_head, mask, token < new_tokens, D
            )
    elif run == 0:
        kv_head = (head - query_heads) % kv_heads
        slot = tl.load(new_slots + token, token < new_tokens, other=0)
        cache_row = kv_head.to(tl.int64) * capacity + slot
        offsets = cache_row[:, None] * D + d[None, :]
        if head < query_heads + kv_heads:
            low, high = biased_rows(qkv, qkv_bias, token, head, heads, has_bias, mask, D)
            if OFFSET:
                low -= tl.load(key_offset + kv_head * D + d)[None, :]
                high -= tl.load(key_offset + kv_head * D + D // 2 + d)[None, :]
            cos, sin = rope_angles(rope_cos, rope_sin, token, mask, D)
            low, high = turn(low, high, cos, sin)
            low_codes, high_codes, scale = quantise(low, high)
            store_halves(keys, offsets, D // 2, low_codes, high_codes, mask)
            tl.store(key_scales + cache_row, scale, token < new_tokens)
        else:  # values are kept without their bias: the output gets it, as the weights sum to 1
            low, high = biased_rows(qkv, qkv_bias, token, head, heads, 0, mask, D)
            low_codes, high_codes, scale = quantise(low, high)
            store_halves(values, offsets, D // 2, low_codes, high_codes, mask)
            tl.store(value_scales + cache_row, scale, token < new_tokens)


@triton.jit
def append_f32(
    qkv, qkv_bias, rope_cos, rope_sin, run_cos, run_sin, new_slots, keys, values, queries,
    new_tokens, query_heads, kv_heads, capacity, run_count, factor, has_bias,
    D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """As `append_int8` for float caches (Hkv, C, D); queries: (R + 1, Hkv, T G, D) float32."""
    head, run = tl.program_id(1), tl.program_id(2)
    heads = query_heads + 2 * kv_heads
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, D // 2)
    mask = (token < new_tokens)[:, None] & (d >= 0)[None, :]
    if head < query_heads:
        low, high = turned_queries(
            qkv, qkv_bias, rope_cos, rope_sin, run_cos, run_sin, token, head, heads, run, run_count, factor, has_bias,
            mask, D,
        )  # fmt: skip
        _, row = query_rows(token, head, run, query_heads, kv_heads, new_tokens)
        store_halves(queries, row[:, None] * D + d[None, :], D // 2, low, high, mask)
    elif run == 0:
        low, high = biased_rows(qkv, qkv_bias, token, head, heads, has_bias, mask, D)
        slot = tl.load(new_slots + token, token < new_tokens, other=0)
        cache_row = ((head - query_heads) % kv_heads).to(tl.int64) * capacity + slot
        offsets = cache_row[:, None] * D + d[None, :]
        if head < query_heads + kv_heads:
            cos, sin = rope_angles(rope_cos, rope_sin, token, mask, D)
            low, high = turn(low, high, cos, sin)
            store_halves(keys, offsets, D // 2, low, high, mask)
        else:
            store_halves(values, offsets, D // 2, low, high, mask)


SIZES = {name: "i32" for name in ("new_tokens", "query_heads", "kv_heads", "capacity", "run_count")}
INPUTS = {
    name: "*fp32" for name in ("qkv", "qkv_bias", "rope_cos", "rope_sin", "run_cos", "run_sin", "key_offset")
}  # fmt: skip
INT8_SIGNATURE = {
    **INPUTS,
    "new_slots": "*i32",
    "keys": "*i8",
    "values": "*i8",
    "key_scales": "*fp32",
    "value_scales": "*fp32",
    "codes": "*i8",
    "code_scales": "*fp32",
    "remainders": "*i8",
    "remainder_scales": "*fp32",
    "factors": "*fp16",
    "factor_scales": "*fp32",
    **SIZES,
    "factor": "fp32",
    "has_bias": "i32",
}
F32_SIGNATURE = {
    **{name: kind for name, kind in INPUTS.items() if name != "key_offset"},
    "new_slots": "*i32",
    "keys": "*fp32",
    "values": "*fp32",
    "queries": "*fp32",
    **SIZES,
    "factor": "fp32",
    "has_bias": "i32",
}


def variants() -> list[Variant]:
    """By head width and tokens of a program: one warp for one token (a decode step is a handful of programs, and each
    should end soon), 4 warps for 16 (an append has thousands of rows, and programs cost more than they do)."""
    found = []
    for width in (64, 128):
        for tokens, warps in ((1, 1), (16, 4)):
            sizes = {"D": width, "BLOCK_T": tokens}
            suffix = f"d{width}_t{tokens}"
            found += [
                Variant(
                    f"append_int8_{suffix}", append_int8, INT8_SIGNATURE, {**sizes, "OFFSET": False}, warps, fuse=False
                ),
                Variant(
                    f"append_int8_offset_{suffix}",
                    append_int8,
                    INT8_SIGNATURE,
                    {**sizes, "OFFSET": True},
                    warps,
                    fuse=False,
                ),
                Variant(f"append_f32_{suffix}", append_f32, F32_SIGNATURE, sizes, warps, fuse=False),
            ]
    return found


def work() -> list[Work]:
    """3B heads (16 and 2 of 128), two runs: a token, and a turn of 144."""
    found = []
    for tokens, name in ((1, "append_int8_d128_t1"), (144, "append_int8_d128_t16")):
        read = tokens * (20 * 128 * 4 + 128 * 4)
        written = tokens * (2 * 2 * (128 + 4) + 3 * 16 * (128 + 4))
        case = f"3B, {tokens} new, 2 runs"
        found.append(
            Work(name, case, read + written, fp32_ops=3 * tokens * 16 * 128 * 8, programs=-(-tokens // 16) * 60)
        )
    return found

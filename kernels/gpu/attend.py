"""Attention over cached rows: the running softmax of a block of query rows over a split of the cache.

Owns the inner loops of attention: one source for a decode step (16 rows: the heads of a KV head together) and for the
rows of a turn. The cache is read in place, each row once for each KV head and block of query rows.

What is where:
  - query rows as `append.py` leaves them; run R is that of the new tokens.
  - tiles (n, 4) int32: first row of the cache, rows (1 to 64), run, and the index behind the last tile of that run;
    tiles of one run lie together, so queries are loaded once a run. header[0] on the device is n: grids do not depend
    on the depth of the cache. The new tokens are tiles too, behind the others, their rows named by `new_slots`.
  - split s of a row block takes an even share of its tiles. Its sums, not divided yet, go to the workspace (splits,
    Hkv, T G, D) with each row's maximum and total weight; `merge.py` joins them. A split that got no tile leaves a
    total of 0. With one split the output is written here.

Weights keep their tail: in powers of two, a row's weights are 2^(score + e - maximum + 14), where e is the exponent of
the value row's scale and the maximum is over score + e. So what multiplies the value codes is at most 2^15 in float16,
and still a normal number at 2^-28 of the row's largest contribution, however the value scales differ; the scales cost
one product for a weight. Sums are float32 and leave e out again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant, Work

TILE_ROWS = 64
"""Most rows of a tile; `kTileRows` of kernels/src/gpu/attention_table.h."""
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
"""The maximum of a row that has seen nothing: finite, so that no difference is NaN."""
HEADROOM: tl.constexpr = tl.constexpr(14.0)
ZERO_EXPONENT: tl.constexpr = tl.constexpr(-8)
"""Stands for the exponent of a value row of zeros, which has none: near those of real rows, so that neither drowns."""
LEAST_EXPONENT: tl.constexpr = tl.constexpr(-96)
"""Keeps what takes an exponent out of a sum again within float32, however small the values are."""


@triton.jit
def split_scale(scale):
    """A scale as mantissa times power of two: exponent (float), mantissa, 2^-exponent; by bits, so it costs little."""
    biased = scale.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(biased > 0, tl.maximum(biased - 127, LEAST_EXPONENT), ZERO_EXPONENT)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32), scale * inverse, inverse


@triton.jit
def shares(header, block, rows, group, split, splits, least_tiles, BLOCK_M: tl.constexpr, TILE: tl.constexpr):
    """Tiles of cached rows, and first and last tile of a split among these and those of the new tokens."""
    seen = tl.minimum(block * BLOCK_M + BLOCK_M - 1, rows - 1) // group + 1  # new tokens that the last row sees
    cached = tl.load(header)
    total = cached + (seen + TILE - 1) // TILE
    share = tl.maximum((total + splits - 1) // splits, least_tiles)
    return cached, tl.minimum(split * share, total), tl.minimum((split + 1) * share, total)


@triton.jit
def to_float16(words):
    """Codes (N, D/4), four in an int32, as float16 (N, D).

    A byte c + 128 under the exponent of 1024 is the float16 1152 + c: one bit operation makes two of them, and a sum
    that is exact takes 1152 away, where a conversion instruction makes one at an eighth of the rate. It is done once,
    in the layout the rows were loaded in: converted behind the layout of the product's operand, codes would be read
    from shared memory byte by byte, by every warp.
    """
    even = (words & 0x00FF00FF) ^ 0x64806480
    odd = ((words >> 8) & 0x00FF00FF) ^ 0x64806480
    first = tl.join(low_half(even), low_half(odd))
    second = tl.join(low_half(even >> 16), low_half(odd >> 16))
    quads = tl.permute(tl.join(first, second), (0, 1, 3, 2))  # (N, D/4, pair, one of the pair)
    return tl.reshape(quads, (words.shape[0], 4 * words.shape[1])) - tl.full((1, 1), 1152.0, tl.float16)


@triton.jit
def low_half(words):
    return words.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def add_tile(scores, mantissa, inverse, values, maximum, total, sums):
    """One tile into the running softmax.

    scores: (M, N) in powers of two, the value scales' exponents in them, -inf where not visible; mantissa, inverse:
    (N,) of the value scales; values: (N, D) float16; maximum, total: (M,); sums: (M, D).
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    keep = tl.exp2(maximum - new_maximum)
    weights = tl.exp2(scores - (new_maximum - HEADROOM)[:, None])
    total = tl.fma(total, keep, tl.sum(weights * inverse[None, :], 1))
    weighted = (weights * mantissa[None, :]).to(tl.float16)
    sums = tl.dot(weighted, values, sums * keep[:, None])
    return new_maximum, total, sums


@triton.jit
def write_sums(
    partial_sums, partial_maximum, partial_total, output, value_bias, has_bias, maximum, total, sums,
    any_tile, head, kv_heads, split, splits, row, rows, group, D: tl.constexpr,
):  # fmt: skip
    """With one split the output (T, Hq, D), else the split's sums; of these nothing but the totals without a tile."""
    d = tl.arange(0, D)
    mask = (row < rows)[:, None]
    if splits == 1:
        result = sums / tl.where(total > 0, total, 1.0)[:, None]
        if has_bias != 0:
            result += tl.load(value_bias + head * D + d)[None, :]
        query_head = (row // group).to(tl.int64) * (kv_heads * group) + head * group + row % group
        tl.store(output + query_head[:, None] * D + d[None, :], result, mask)
    else:
        at = (split * kv_heads + head).to(tl.int64) * rows
        tl.store(partial_total + at + row, total, row < rows)
        if any_tile:
            tl.store(partial_maximum + at + row, maximum, row < rows)
            tl.store(partial_sums + at * D + row[:, None] * D + d[None, :], sums, mask)


@triton.jit
def add_offset_scores(scores, coarse, fine, angles):
    """Factors (M, D/2) times angles (N, D/2) float32, both as a sum of two float16: three products give 22 bits."""
    coarse_angles = angles.to(tl.float16)
    fine_angles = (angles - coarse_angles.to(tl.float32)).to(tl.float16)
    scores = tl.dot(coarse, tl.trans(coarse_angles), scores)
    scores = tl.dot(coarse, tl.trans(fine_angles), scores)
    return tl.dot(fine, tl.trans(coarse_angles), scores)


@triton.jit
def load_codes(codes, scales, at, row, rows, D: tl.constexpr):
    offsets = at * D + row[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(codes + offsets, (row < rows)[:, None], other=0), tl.load(scales + at + row, row < rows, other=0.0)


@triton.jit
def load_queries(
    codes, code_scales, remainders, remainder_scales, factors, factor_scales, at, row, rows,
    D: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Queries of one run, whose first row is `at`: codes (M, D) and scales (M,); with OFFSET also the remainders'
    codes and scales, the factors of cosines and sines, (M, D/2) coarse and fine each, and their scales."""
    query, scale = load_codes(codes, code_scales, at, row, rows, D)
    if not OFFSET:
        return query, scale
    remainder, remainder_scale = load_codes(remainders, remainder_scales, at, row, rows, D)
    first = factors + at * (2 * D) + row[:, None] * (2 * D) + tl.arange(0, D // 2)[None, :]
    mask = (row < rows)[:, None]
    coarse_cos, coarse_sin = tl.load(first, mask, other=0.0), tl.load(first + D // 2, mask, other=0.0)
    fine_cos, fine_sin = tl.load(first + D, mask, other=0.0), tl.load(first + D + D // 2, mask, other=0.0)
    factor_scale = tl.load(factor_scales + at + row, row < rows, other=0.0)
    return query, scale, remainder, remainder_scale, coarse_cos, fine_cos, coarse_sin, fine_sin, factor_scale


@triton.jit
def attend_to_slots(
    queries, slot, here, visible, keys, values, key_scales, value_scales, slot_cos, slot_sin, maximum, total, sums,
    D: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Rows `slot` (N,) behind the pointers into the running softmax; where not `here` nothing is read.

    visible: (1 or M, N). With OFFSET the score gets what the keys' offset and the rounding of the queries owe it.
    """
    key = tl.load(keys + (slot[:, None] * D + tl.arange(0, D)[None, :]), here[:, None], other=0)
    value = tl.load(values + (slot[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :]), here[:, None], other=0)
    key_scale = tl.load(key_scales + slot, here, other=0.0)
    value_scale = tl.load(value_scales + slot, here, other=0.0)
    scores = tl.dot(queries[0], tl.trans(key), out_dtype=tl.int32).to(tl.float32) * queries[1][:, None]
    if OFFSET:
        lost = tl.dot(queries[2], tl.trans(key), out_dtype=tl.int32).to(tl.float32)
        scores = tl.fma(lost, tl.broadcast_to(queries[3][:, None], lost.shape), scores)
    exponent, mantissa, inverse = split_scale(value_scale)
    scores = tl.fma(
        scores, tl.broadcast_to(key_scale[None, :], scores.shape), tl.broadcast_to(exponent[None, :], scores.shape)
    )
    if OFFSET:
        angles = slot[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos = tl.load(slot_cos + angles, here[:, None], other=0.0)
        sin = tl.load(slot_sin + angles, here[:, None], other=0.0)
        owed = add_offset_scores(tl.zeros(scores.shape, tl.float32), queries[4], queries[5], cos)
        owed = add_offset_scores(owed, queries[6], queries[7], sin)
        scores = tl.fma(owed, tl.broadcast_to(queries[8][:, None], owed.shape), scores)
    scores = tl.where(visible, scores, float("-inf"))
    return add_tile(scores, mantissa, inverse, to_float16(value), maximum, total, sums)


@triton.jit
def attend_int8(
    codes, code_scales, remainders, remainder_scales, factors, factor_scales,
    keys, values, key_scales, value_scales, slot_cos, slot_sin,
    header, tiles, new_slots, partial_sums, partial_maximum, partial_total, output, value_bias,
    rows, group, new_tokens, capacity, run_count, least_tiles, has_bias,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, ceil(T G / BLOCK_M), splits). What only OFFSET reads may be null without it."""
    head, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(0), tl.num_programs(2)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    token = row // group
    cached, begin, end = shares(header, block, rows, group, split, splits, least_tiles, BLOCK_M, TILE)
    first_row = head.to(tl.int64) * capacity
    keys += first_row * D
    values = values.to(tl.pointer_type(tl.int32)) + first_row * (D // 4)
    key_scales += first_row
    value_scales += first_row

    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, D), tl.float32)
    parts: tl.constexpr = TILE // BLOCK_N

    tile, last = begin, tl.minimum(end, cached)
    while tile < last:
        run = tl.load(tiles + tile * 4 + 2)
        stop = tl.minimum(tl.load(tiles + tile * 4 + 3), last)
        at = (run * kv_heads + head).to(tl.int64) * rows
        queries = load_queries(
            codes, code_scales, remainders, remainder_scales, factors, factor_scales, at, row, rows, D, OFFSET
        )
        first, count = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
        for part in range(tile * parts, stop * parts):
            behind = part % parts * BLOCK_N + n
            base = first.to(tl.int64)
            here = behind < count
            maximum, total, sums = attend_to_slots(
                queries, behind, here, here[None, :], keys + base * D, values + base * (D // 4), key_scales + base,
                value_scales + base, slot_cos + base * (D // 2), slot_sin + base * (D // 2), maximum, total, sums,
                D, OFFSET,
            )  # fmt: skip
            # Read one step ahead: where the rows are must not be waited for. Behind the last tile lies one of zeros.
            first, count = tl.load(tiles + (part + 1) // parts * 4), tl.load(tiles + (part + 1) // parts * 4 + 1)
        tile = stop

    if end > cached:
        at = (run_count * kv_heads + head).to(tl.int64) * rows
        queries = load_queries(
            codes, code_scales, remainders, remainder_scales, factors, factor_scales, at, row, rows, D, OFFSET
        )
        for part in tl.range(tl.maximum(begin - cached, 0) * parts, (end - cached) * parts, num_stages=1):
            index = part * BLOCK_N + n
            here = index < new_tokens
            slot = tl.load(new_slots + index, here, other=0).to(tl.int64)
            maximum, total, sums = attend_to_slots(
                queries, slot, here, index[None, :] <= token[:, None], keys, values, key_scales, value_scales,
                slot_cos, slot_sin, maximum, total, sums, D, OFFSET,
            )  # fmt: skip

    write_sums(
        partial_sums, partial_maximum, partial_total, output, value_bias, has_bias, maximum, total, sums,
        end > begin, head, kv_heads, split, splits, row, rows, group, D,
    )  # fmt: skip


TABLE = {"header": "*i32", "tiles": "*i32", "new_slots": "*i32"}
PARTS = {"partial_sums": "*fp32", "partial_maximum": "*fp32", "partial_total": "*fp32", "output": "*fp32"}
SIZES = {name: "i32" for name in ("rows", "group", "new_tokens", "capacity", "run_count", "least_tiles")}
INT8_SIGNATURE = {
    "codes": "*i8", "code_scales": "*fp32", "remainders": "*i8", "remainder_scales": "*fp32",
    "factors": "*fp16", "factor_scales": "*fp32",
    "keys": "*i8", "values": "*i8", "key_scales": "*fp32", "value_scales": "*fp32",
    "slot_cos": "*fp32", "slot_sin": "*fp32",
    **TABLE, **PARTS, "value_bias": "*fp32", **SIZES, "has_bias": "i32",
}  # fmt: skip


def variants() -> list[Variant]:
    """16 rows for a decode step, more for the rows of a turn. Nothing is fused but what `tl.fma` says, so the
    interpreter computes what a device does, up to the order inside a product."""
    found = []
    for width in (64, 128):
        # Three tiles under way hide the memory's latency with one program on a multiprocessor; 128 rows read the cache
        # from the L2 half as often as 64, and with D = 128 keep each row's softmax inside a warp.
        for rows, warps in ((16, 4), (128, 8)):
            sizes = {"D": width, "BLOCK_M": rows, "BLOCK_N": 64, "TILE": TILE_ROWS, "OFFSET": False}
            found.append(
                Variant(f"attend_int8_d{width}_m{rows}", attend_int8, INT8_SIGNATURE, sizes, warps, 3, fuse=False)
            )
        # With an offset the queries are five operands, and a cached row is 4 times as many bytes: smaller blocks, or
        # there would be neither registers nor the 99 KB of shared memory that sm_86 and sm_120 have.
        for rows, warps in ((16, width // 16), (32, 8)):
            sizes = {"D": width, "BLOCK_M": rows, "BLOCK_N": 32, "TILE": TILE_ROWS, "OFFSET": True}
            found.append(
                Variant(
                    f"attend_int8_offset_d{width}_m{rows}", attend_int8, INT8_SIGNATURE, sizes, warps, 2, fuse=False
                )
            )
    return found


def work() -> list[Work]:
    """A layer of 3B (16 and 2 heads of 128) and of 7B (28 and 4). A cached row is read once for each KV head: 128 codes
    of a key and of a value, and their scales; in an append by each block of 128 query rows, then from the L2."""
    found = []
    for model, kv_heads, group in (("3B", 2, 8), ("7B", 4, 7)):
        for depth in (4096, 16384, 65536):
            traffic = depth * kv_heads * (2 * 128 + 8)
            products = 2 * depth * kv_heads * 16 * 128
            found.append(
                Work("attend_int8_d128_m16", f"{model}, 1 token at depth {depth:,}", traffic, products, products)
            )
        rows = -(-144 * group // 128) * 128
        traffic = 16384 * kv_heads * (2 * 128 + 8) + 144 * group * kv_heads * 128 * (1 + 4)
        products = 2 * (16384 + 72) * kv_heads * rows * 128
        found.append(Work("attend_int8_d128_m128", f"{model}, 144 tokens at depth 16,384", traffic, products, products))
    return found

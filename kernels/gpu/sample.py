"""The next token from a row of logits, on the device: the largest, or one of the likely ones.

Owns the choice that `edge/sampling.py` defines; the random number is the caller's, so that host and device choose
alike. The largest is exact: the first of equal ones, a NaN above all, as numpy's argmax.

Sampling sorts nothing. Tokens in falling order of logits reach a given share of the probability at some logit; it is
found by cutting the range of possible logits in four again and again, each time summing the weights above the three
cuts (about 17 readings of the logits from the cache for each of top_k, top_p and the random number). Among equal logits
the first tokens come first. Weights are float32 and summed in a fixed order: the token is the host's, which sums in
float64, unless the random number or top_p falls within 1e-5 of the border between two tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant

CHUNK = 2048
BLOCK = 2048
LOWEST_KEY: tl.constexpr = tl.constexpr(-(1 << 31))
HIGHEST_KEY: tl.constexpr = tl.constexpr((1 << 31) - 1)


@triton.jit
def keys_of(logits):
    """Integers that order as the numbers do; 0.0 and -0.0 are equal, NaN is highest."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(logits != logits, HIGHEST_KEY, keys)


@triton.jit
def logit_of(key):
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def largest_of_chunks(logits, best_keys, best_tokens, vocabulary, CHUNK: tl.constexpr):
    """The highest key of each chunk of the vocabulary, and the first token that has it. Grid: (chunks)."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    live = token < vocabulary
    keys = tl.where(live, keys_of(tl.load(logits + token, live, other=0.0)), LOWEST_KEY)
    best = tl.max(keys, 0)
    first = tl.min(tl.where(live & (keys == best), token, vocabulary), 0)
    tl.store(best_keys + tl.program_id(0), best)
    tl.store(best_tokens + tl.program_id(0), first)


@triton.jit
def largest_of_all(best_keys, chunks, BLOCK: tl.constexpr):
    best = tl.full((BLOCK,), LOWEST_KEY, tl.int32)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(best_keys + at, at < chunks, other=LOWEST_KEY))
    return tl.max(best, 0)


@triton.jit
def choose_largest(best_keys, best_tokens, token, chunks, vocabulary, BLOCK: tl.constexpr):
    """token[0] = the first token with the highest key. One program."""
    best = largest_of_all(best_keys, chunks, BLOCK)
    first = tl.full((BLOCK,), 0, tl.int32) + vocabulary
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < chunks
        is_best = live & (tl.load(best_keys + at, live, other=LOWEST_KEY) == best)
        first = tl.minimum(first, tl.load(best_tokens + at, is_best, other=HIGHEST_KEY))
    tl.store(token, tl.min(first, 0))


@triton.jit
def weights_of(logits, largest, per_temperature, COUNT: tl.constexpr):
    """exp((logit - largest) / temperature); 1 where tokens are only counted."""
    if COUNT:
        return logits * 0.0 + 1.0
    return tl.exp((logits - largest) * per_temperature)


@triton.jit
def mass_above(
    logits, vocabulary, cut_1, cut_2, cut_3, largest, per_temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of the weights with keys of at least each of three cuts."""
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_2 = tl.zeros((BLOCK,), tl.float32)
    sum_3 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < vocabulary
        x = tl.load(logits + at, live, other=0.0)
        keys = keys_of(x)
        weights = tl.where(live, weights_of(x, largest, per_temperature, COUNT), 0.0)
        sum_1 += tl.where(keys >= cut_1, weights, 0.0)
        sum_2 += tl.where(keys >= cut_2, weights, 0.0)
        sum_3 += tl.where(keys >= cut_3, weights, 0.0)
    return tl.sum(sum_1, 0), tl.sum(sum_2, 0), tl.sum(sum_3, 0)


@triton.jit
def find(
    logits, vocabulary, target, floor, floor_count, best, largest, per_temperature, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest key at which the mass of keys from there up reaches `target`, and how many of its tokens it takes.

    Of tokens with the key `floor` the first `floor_count` may be taken, of lower ones none.

    Returns: the key, the number of its tokens (at least 1), the mass above it, the weight of one of its tokens.
    """
    low = floor.to(tl.int64)
    high = best.to(tl.int64) + 1
    while high - low > 1:
        quarter = tl.maximum((high - low) // 4, 1)
        cut_1 = low + quarter
        cut_2 = tl.minimum(low + 2 * quarter, high - 1)
        cut_3 = tl.minimum(low + 3 * quarter, high - 1)
        mass_1, mass_2, mass_3 = mass_above(
            logits, vocabulary, cut_1.to(tl.int32), cut_2.to(tl.int32), cut_3.to(tl.int32), largest, per_temperature,
            COUNT, BLOCK,
        )  # fmt: skip
        reached = tl.where(mass_3 >= target, 3, tl.where(mass_2 >= target, 2, tl.where(mass_1 >= target, 1, 0)))
        high = tl.where(reached == 3, high, tl.where(reached == 2, cut_3, tl.where(reached == 1, cut_2, cut_1)))
        low = tl.where(reached == 3, cut_3, tl.where(reached == 2, cut_2, tl.where(reached == 1, cut_1, low)))
    key = low.to(tl.int32)
    next_key = tl.minimum(low + 1, best).to(tl.int32)  # above the best there is nothing, and perhaps no number
    above, _, _ = mass_above(logits, vocabulary, next_key, next_key, next_key, largest, per_temperature, COUNT, BLOCK)
    more, here, _ = mass_above(logits, vocabulary, next_key, key, key, largest, per_temperature, True, BLOCK)
    above = tl.where(key == best, 0.0, above)
    weight = weights_of(logit_of(key), largest, per_temperature, COUNT)
    most = tl.where(key == floor, floor_count, tl.where(key == best, here, here - more))
    wanted = tl.ceil(tl.fdiv(target - above, weight))
    return key, tl.minimum(tl.maximum(wanted, 1.0), most), above, weight


@triton.jit
def choose_likely(
    logits, best_keys, token, vocabulary, chunks, per_temperature, top_k, top_p, random, BLOCK: tl.constexpr
):
    """token[0] = the token that `edge.sampling` chooses for the number `random`, from 0 to below 1. One program."""
    best = largest_of_all(best_keys, chunks, BLOCK)
    largest = logit_of(best)
    floor = best * 0 + LOWEST_KEY
    floor_count = tl.zeros((), tl.float32)
    total, _, _ = mass_above(logits, vocabulary, floor, floor, floor, largest, per_temperature, False, BLOCK)
    if (top_k > 0) & (top_k < vocabulary):
        floor, floor_count, _, _ = find(
            logits, vocabulary, top_k.to(tl.float32), floor, floor_count, best, largest, per_temperature, True, BLOCK
        )
        next_key = tl.minimum(floor.to(tl.int64) + 1, best).to(tl.int32)
        above, _, _ = mass_above(
            logits, vocabulary, next_key, next_key, next_key, largest, per_temperature, False, BLOCK
        )
        above = tl.where(floor == best, 0.0, above)
        total = above + floor_count * weights_of(logit_of(floor), largest, per_temperature, False)
    if top_p < 1.0:
        floor, floor_count, above, weight = find(
            logits, vocabulary, total * top_p, floor, floor_count, best, largest, per_temperature, False, BLOCK
        )
        total = above + floor_count * weight
    key, wanted, _, _ = find(
        logits, vocabulary, total * random, floor, floor_count, best, largest, per_temperature, False, BLOCK
    )
    # The token is the `wanted`-th with that key.
    seen = tl.zeros((), tl.int32)
    chosen = tl.zeros((), tl.int32) + vocabulary - 1
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < vocabulary
        same = tl.where(live & (keys_of(tl.load(logits + at, live, other=0.0)) == key), 1, 0)
        rank = seen + tl.cumsum(same, 0)
        found = tl.where((same == 1) & (rank == wanted.to(tl.int32)), at, vocabulary)
        chosen = tl.minimum(chosen, tl.min(found, 0))
        seen += tl.sum(same, 0)
    tl.store(token, chosen)


def variants() -> list[Variant]:
    """A part of the vocabulary in each program, then one program that chooses."""
    chunk = {"logits": "*fp32", "best_keys": "*i32", "best_tokens": "*i32", "vocabulary": "i32"}
    greedy = {"best_keys": "*i32", "best_tokens": "*i32", "token": "*i32", "chunks": "i32", "vocabulary": "i32"}
    likely = {"logits": "*fp32", "best_keys": "*i32", "token": "*i32", "vocabulary": "i32", "chunks": "i32",
              "per_temperature": "fp32", "top_k": "i32", "top_p": "fp32", "random": "fp32"}  # fmt: skip
    return [
        Variant("sample_chunks", largest_of_chunks, chunk, {"CHUNK": CHUNK}, num_warps=8),
        Variant("sample_largest", choose_largest, greedy, {"BLOCK": 128}, num_warps=4),
        Variant("sample_likely", choose_likely, likely, {"BLOCK": BLOCK}, num_warps=8),
    ]

"""How the bundle's weights become numbers that a GPU multiplies, without a conversion instruction.

Owns the bit patterns. Knows no product. Weights come as 32-bit words of one row of K: eight 4-bit columns or four 8-bit
ones, the first in the low bits. A code's sign bit is flipped first, which adds 8 (or 128): the rest is a plain number.

Every form is two's complement arithmetic that Triton's interpreter runs bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONE: tl.constexpr = tl.constexpr(0x3F800000)
"""The float32 1.0. Digits put below its exponent give 1 + n / 2^k at the cost of one bitwise instruction."""


@triton.jit
def float32_one(number):
    """`ONE` for any `number` of at least 0, which the compiler does not know.

    A constant is copied to a register before each use, one more instruction for every weight; a value stays in its
    register.
    """
    return ONE + (number >> 31)


@triton.jit
def float32_near_one(words, one, SHIFT: tl.constexpr, POSITION: tl.constexpr, BITS: tl.constexpr):
    """1 + n / 2^(23 - POSITION) for the digits n that `words`, shifted left by SHIFT, has at POSITION."""
    if SHIFT > 0:
        words = words << SHIFT
    if SHIFT < 0:
        words = words >> -SHIFT  # the sign's copies fall outside of the mask
    mask: tl.constexpr = ((1 << BITS) - 1) << POSITION
    return ((words & mask) | one).to(tl.float32, bitcast=True)


@triton.jit
def float16_pair(words, magic: tl.constexpr, mask: tl.constexpr, zero: tl.constexpr):
    """The codes in the low and in the high half of `words`, as float16 in a last axis of 2.

    0x6400 is 1024 in float16, whose last digit counts 1: the code's digits below it make 1024 + n, exactly, and one
    subtraction for both halves takes off 1024 and the zero point.
    """
    both = (words & mask) ^ magic
    low = both.to(tl.int16).to(tl.float16, bitcast=True)
    high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low - zero, high - zero)


@triton.jit
def float16_of_words(words, BITS: tl.constexpr):
    """Codes (K, W) int32 as float16 (K, W * 32 / BITS), exactly; columns of a word in the order of `column_order`."""
    if BITS == 4:
        pairs_0 = float16_pair(words, 0x64086408, 0x000F000F, 1032.0)
        pairs_1 = float16_pair(words >> 4, 0x64086408, 0x000F000F, 1032.0)
        pairs_2 = float16_pair(words >> 8, 0x64086408, 0x000F000F, 1032.0)
        pairs_3 = float16_pair(words >> 12, 0x64086408, 0x000F000F, 1032.0)
        joined = tl.join(tl.join(pairs_0, pairs_2), tl.join(pairs_1, pairs_3))  # K, W, half, upper bit, lower bit
        ordered = tl.permute(joined, (0, 1, 3, 4, 2))
    else:
        pairs_0 = float16_pair(words, 0x64806480, 0x00FF00FF, 1152.0)
        pairs_1 = float16_pair(words >> 8, 0x64806480, 0x00FF00FF, 1152.0)
        ordered = tl.permute(tl.join(pairs_0, pairs_1), (0, 1, 3, 2))
    return tl.reshape(ordered, (words.shape[0], words.shape[1] * (32 // BITS)))


@triton.jit
def column_order(place, BITS: tl.constexpr):
    """The column that `float16_of_words` puts at `place`: a word's halves are neighbours."""
    columns: tl.constexpr = 32 // BITS
    inside = place % columns
    return place - inside + inside // 2 + (columns // 2) * (inside % 2)


@triton.jit
def in_column_order(values, BITS: tl.constexpr):
    """Values of consecutive columns, put into the order of `column_order`."""
    half: tl.constexpr = 16 // BITS
    words = tl.reshape(values, (values.shape[0] // (2 * half), 2, half))
    return tl.reshape(tl.permute(words, (0, 2, 1)), values.shape)

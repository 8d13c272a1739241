"""A camera frame on the device to the vision tower's input: resize, normalise, patchify.

Owns the arithmetic of `edge/preprocess.py`, whose resize is Pillow's: two passes with weights in fixed point, each
rounded to 8 bits. Weights and their places come from the host, made once for each size. All of it is in integers and in
single float32 roundings: from RGB the patches equal the CPU's to the last bit. Lines first, then columns, as Pillow
does; from version 13 on Pillow turns that around for some sizes, whose pixels may then differ by several levels where
there is noise.

NV12 becomes RGB while it is read, each 2x2 of pixels with one pair of colour differences, in fixed point of 20 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant

COLUMNS = 64
LINES = 16
PIXELS = 1024


@triton.jit
def to_byte(fixed, BITS: tl.constexpr):
    """Fixed point to the nearest of 0 .. 255."""
    return tl.minimum(tl.maximum((fixed + (1 << (BITS - 1))) >> BITS, 0), 255)


@triton.jit
def load_rgb(
    plane, chroma, line, column, live, plane_stride, chroma_stride, black, luma, red_v, green_u, green_v, blue_u,
    NV12: tl.constexpr,
):  # fmt: skip
    """Red, green and blue, 0 .. 255, of pixels (lines, columns)."""
    if NV12:
        y = tl.load(plane + line * plane_stride + column, live, other=0).to(tl.int32)
        pair = chroma + (line // 2) * chroma_stride + column // 2 * 2
        u = tl.load(pair, live, other=128).to(tl.int32) - 128
        v = tl.load(pair + 1, live, other=128).to(tl.int32) - 128
        y = tl.maximum(y - black, 0) * luma
        red = to_byte(y + red_v * v, 20)
        green = to_byte(y + green_u * u + green_v * v, 20)
        blue = to_byte(y + blue_u * u, 20)
    else:
        pixel = plane + line * plane_stride + column * 3
        red = tl.load(pixel, live, other=0).to(tl.int32)
        green = tl.load(pixel + 1, live, other=0).to(tl.int32)
        blue = tl.load(pixel + 2, live, other=0).to(tl.int32)
    return red, green, blue


@triton.jit
def frame_columns(
    plane, chroma, starts, counts, weights, narrow, height, new_width, taps, plane_stride, chroma_stride, black, luma,
    red_v, green_u, green_v, blue_u, NV12: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """narrow (3, height, new_width) uint8: the frame with its lines resized. Grid: (columns, lines).

    Args:
      starts, counts: (new_width) int32, the pixels of the frame that a new one is made of.
      weights: (taps, new_width) int32, in 2^-22.
    """
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = (tl.program_id(1) * LINES + tl.arange(0, LINES))[:, None]
    exists = x < new_width
    start = tl.load(starts + x, exists, other=0)
    count = tl.load(counts + x, exists, other=0)
    red = tl.zeros((LINES, COLUMNS), tl.int32)
    green = red
    blue = red
    for tap in range(0, taps):
        used = exists & (tap < count)
        weight = tl.load(weights + tap * new_width + x, used, other=0)[None]
        r, g, b = load_rgb(
            plane, chroma, line.to(tl.int64), (start + tap)[None], used[None] & (line < height), plane_stride,
            chroma_stride, black, luma, red_v, green_u, green_v, blue_u, NV12,
        )  # fmt: skip
        red += r * weight
        green += g * weight
        blue += b * weight
    place = line * new_width + x[None]
    live = exists[None] & (line < height)
    plane_size = height * new_width
    tl.store(narrow + place, to_byte(red, 22).to(tl.uint8), live)
    tl.store(narrow + plane_size + place, to_byte(green, 22).to(tl.uint8), live)
    tl.store(narrow + 2 * plane_size + place, to_byte(blue, 22).to(tl.uint8), live)


@triton.jit
def by_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def frame_patches(
    narrow, starts, counts, weights, output, height, new_height, new_width, taps, patch, merge, mean_r, mean_g, mean_b,
    deviation_r, deviation_g, deviation_b, PIXELS: tl.constexpr,
):  # fmt: skip
    """output (patches, 3 patch^2) float32, in the order of `preprocess.patchify`. Grid: (patches, parts of a patch).

    Args:
      narrow: (3, height, new_width) uint8. starts, counts: (new_height) int32. weights: (taps, new_height) int32.
      mean, deviation: of pixels from 0 to 255.
    """
    index = tl.program_id(0)
    blocks_across = new_width // (patch * merge)
    inside_block = index % (merge * merge)
    block = index // (merge * merge)
    top = (block // blocks_across * merge + inside_block // merge) * patch
    left = (block % blocks_across * merge + inside_block % merge) * patch
    area = patch * patch
    at = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    live = at < 3 * area
    channel = at // area
    y = top + at % area // patch
    x = left + at % patch
    start = tl.load(starts + y, live, other=0)
    count = tl.load(counts + y, live, other=0)
    source = narrow + channel * (height * new_width) + x
    total = tl.zeros((PIXELS,), tl.int32)
    for tap in range(0, taps):
        used = live & (tap < count)
        value = tl.load(source + (start + tap) * new_width, used, other=0).to(tl.int32)
        total += value * tl.load(weights + tap * new_height + y, used, other=0)
    pixel = to_byte(total, 22).to(tl.float32)
    centred = pixel - by_channel(channel, mean_r, mean_g, mean_b)
    normal = tl.div_rn(centred, by_channel(channel, deviation_r, deviation_g, deviation_b))
    tl.store(output + index.to(tl.int64) * (3 * area) + at, normal, live)


def variants() -> list[Variant]:
    """The first pass from each kind of frame, and the second."""
    columns = {"plane": "*u8", "chroma": "*u8", "starts": "*i32", "counts": "*i32", "weights": "*i32", "narrow": "*u8",
               "height": "i32", "new_width": "i32", "taps": "i32", "plane_stride": "i64", "chroma_stride": "i64",
               "black": "i32", "luma": "i32", "red_v": "i32", "green_u": "i32", "green_v": "i32",
               "blue_u": "i32"}  # fmt: skip
    patches = {"narrow": "*u8", "starts": "*i32", "counts": "*i32", "weights": "*i32", "output": "*fp32",
               "height": "i32", "new_height": "i32", "new_width": "i32", "taps": "i32", "patch": "i32", "merge": "i32",
               "mean_r": "fp32", "mean_g": "fp32", "mean_b": "fp32", "deviation_r": "fp32", "deviation_g": "fp32",
               "deviation_b": "fp32"}  # fmt: skip
    # Frames come from anywhere: only our own arrays are known to be aligned.
    ours = ("starts", "counts", "weights", "narrow")
    return [
        Variant(f"frame_columns_{'nv12' if nv12 else 'rgb'}", frame_columns, columns,
                {"NV12": nv12, "LINES": LINES, "COLUMNS": COLUMNS}, num_warps=4, aligned=ours)
        for nv12 in (False, True)
    ] + [Variant("frame_patches", frame_patches, patches, {"PIXELS": PIXELS}, num_warps=4)]  # fmt: skip

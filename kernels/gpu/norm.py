"""RMSNorm of rows, with the addition in front of it.

Owns the formula of `streamo_gpu_norm`. For graphs that have no such operator; ONNX Runtime's CUDA provider has its own.
A row is read twice, the second time from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .variant import Variant

COLUMNS = 2048


@triton.jit
def sum_of(input, residual, residual_width, at, live):
    x = tl.load(input + at, live, other=0.0)
    return x + tl.load(residual + at, live & (at < residual_width), other=0.0)


@triton.jit
def norm(input, residual, weight, sum, output, width, epsilon, residual_width, sum_width, COLUMNS: tl.constexpr):
    """output = x / sqrt(mean(x^2) + epsilon) * weight, x = input + residual; `sum` gets x. Grid: (rows).

    residual_width, sum_width: 0 where there is none.
    """
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, COLUMNS)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):
        at = first + column
        x = sum_of(input + start, residual + start, residual_width, at, at < width)
        squares = tl.fma(x, x, squares)
    mean = tl.sum(squares, 0) / width.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(mean + epsilon)
    for first in range(0, width, COLUMNS):
        at = first + column
        live = at < width
        x = sum_of(input + start, residual + start, residual_width, at, live)
        # Each number is written by the thread that has read it: `sum` may be the input or the residual.
        tl.store(sum + start + at, x, live & (at < sum_width))
        tl.store(output + start + at, x * inverse * tl.load(weight + at, live, other=0.0), live)


def variants() -> list[Variant]:
    """One, for any width."""
    signature = {"input": "*fp32", "residual": "*fp32", "weight": "*fp32", "sum": "*fp32", "output": "*fp32",
                 "width": "i32", "epsilon": "fp32", "residual_width": "i32", "sum_width": "i32"}  # fmt: skip
    return [Variant("norm", norm, signature, {"COLUMNS": COLUMNS}, num_warps=8)]

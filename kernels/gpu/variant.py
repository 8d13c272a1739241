"""What one compiled GPU kernel is: a Triton function, the types of its arguments and the constants it is compiled for.

Owns the two records that every kernel file of this folder gives: `Variant` (what to compile) and `Work` (what a call
moves and computes, for predictions). Knows neither Triton nor a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TYPE_LETTERS = {"i32": "i", "i64": "l", "u64": "l", "fp32": "f"}
"""One letter for each type of argument; every pointer is `p`. The launcher checks its arguments by them."""


@dataclass(frozen=True)
class Variant:
    """One kernel of a cubin archive.

    Attributes:
      name: unique among all variants, e.g. `attend_int8_d128_m16`; the launcher finds the kernel by it.
      function: what `@triton.jit` made.
      signature: every run-time argument in the function's order and its type: `*fp32`, `*fp16`, `*i8`, `*u8`, `*i32`,
        `i32`, `i64`, `fp32`.
      constants: the values of all other parameters of the function (`tl.constexpr`).
      num_warps: warps of 32 threads in one program. num_stages: depth of software pipelines.
      aligned: arguments whose value is a multiple of 16 (pointers: of 16 bytes); None: all pointers, and no number.
      most_registers: of a thread, wherever the compiler can do with so many and spill nothing; so that one program more
        finds room on a multiprocessor. None: as many as it likes.
      fuse: whether the compiler may make one instruction, and one rounding, of a product and a sum. False where bits
        must be those of the CPU kernels; `tl.fma` says then where it is wanted.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] | None = None
    fuse: bool = True
    most_registers: int | None = None

    @property
    def aligned_arguments(self) -> tuple[str, ...]:
        """`aligned`, with None spelled out."""
        if self.aligned is not None:
            return self.aligned
        return tuple(name for name, kind in self.signature.items() if kind.startswith("*"))

    @property
    def letters(self) -> str:
        """The run-time arguments' types, one letter each."""
        return "".join("p" if kind.startswith("*") else TYPE_LETTERS[kind] for kind in self.signature.values())


@dataclass(frozen=True)
class Work:
    """What one call of a kernel has to move and compute at a stated shape, whatever the device.

    Attributes:
      variant: name of the kernel. case: the shape in words, e.g. `3B, one row, depth 4,096`.
      bytes_moved: read and written, each byte once, as if caches were perfect.
      int8_tensor_ops, fp16_tensor_ops, fp32_ops: operations by unit; a multiply and an add are two.
      programs: how many programs the grid has; 0 where that depends on the device.
    """

    variant: str
    case: str
    bytes_moved: int
    int8_tensor_ops: int = 0
    fp16_tensor_ops: int = 0
    fp32_ops: int = 0
    programs: int = 0

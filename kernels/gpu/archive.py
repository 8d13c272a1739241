"""The file that holds the machine code of all GPU kernels for one GPU generation.

Owns the format, which `kernels/src/gpu/archive.h` describes and reads. The same entries give the same bytes. Knows
neither Triton nor where machine code comes from.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

MAGIC = b"STREAMOGPU1\0"
CUBIN_ALIGNMENT = 16


@dataclass(frozen=True)
class ArchivedKernel:
    """One kernel: how it is found and launched, what the compiler says of it, and its machine code (a cubin).

    `letters` are the run-time arguments' types as in `Variant.letters`; `spill_bytes` is the local memory of one
    thread: registers that did not fit, and arrays on the stack.
    """

    name: str
    symbol: str
    letters: str
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    cubin: bytes


def archive_name(sm: int) -> str:
    """Name of the file for a compute capability, e.g. 87."""
    return f"sm_{sm}.cubins"


def archive_bytes(sm: int, cuda_version: int, kernels: Sequence[ArchivedKernel]) -> bytes:
    """The whole file.

    Args:
      sm: compute capability, 10 * major + minor.
      cuda_version: of the assembler that made the cubins, 1000 * major + 10 * minor; a driver of an older major
        version cannot load them.
    """
    data = bytearray(MAGIC + struct.pack("<III", sm, cuda_version, len(kernels)))
    for kernel in kernels:
        for text in (kernel.name, kernel.symbol, kernel.letters):
            encoded = text.encode()
            data += struct.pack("<H", len(encoded)) + encoded
        data += struct.pack("<IIII", kernel.num_warps, kernel.shared_bytes, kernel.registers, kernel.spill_bytes)
        data += struct.pack("<I", len(kernel.cubin))
        data += bytes(-len(data) % CUBIN_ALIGNMENT) + kernel.cubin
    return bytes(data) + hashlib.sha256(data).digest()

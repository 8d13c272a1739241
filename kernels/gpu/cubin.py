"""What a cubin says of its kernel: registers, local memory, and its parameters.

Owns the reading of the ELF file and of its `.nv.info` sections, where the assembler leaves such facts. Knows nothing of
how the cubin came to be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Attributes of `.nv.info` sections, as cuobjdump names them (EIATTR_...).
REGISTER_COUNT, FRAME_SIZE, PARAMETER, REQUIRED_THREADS = 0x2F, 0x11, 0x17, 0x10
SIZED = 0x04  # an entry with a 16-bit size before its value; all others have a 16-bit value


@dataclass(frozen=True)
class CubinFacts:
    """Of one kernel.

    Attributes:
      symbol: its name in the file. registers: for one thread. local_bytes: local memory for one thread: spilled
        registers and arrays on the stack; 0 is what we want. parameter_bytes: size of each parameter in order.
      threads: how many a block must have, in x, y and z: a launch with others fails.
    """

    symbol: str
    registers: int
    local_bytes: int
    parameter_bytes: tuple[int, ...]
    threads: tuple[int, ...]


def cubin_facts(cubin: bytes) -> CubinFacts:
    """Facts of the only kernel in a cubin.

    Raises:
      ValueError: it is no cubin, or holds none or several kernels.
    """
    sections = dict(_sections(cubin))
    kernels = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    if len(kernels) != 1:
        raise ValueError(f"a cubin should hold one kernel, found {kernels}")
    found = {
        attribute: struct.unpack("<II", value)[1]
        for attribute, value in _attributes(sections[".nv.info"])
        if attribute in (REGISTER_COUNT, FRAME_SIZE)
    }
    own = list(_attributes(sections[f".nv.info.{kernels[0]}"]))
    parameters = sorted(struct.unpack("<IHHI", value)[1:] for attribute, value in own if attribute == PARAMETER)
    threads = [struct.unpack("<III", value) for attribute, value in own if attribute == REQUIRED_THREADS]
    sizes = tuple(packed >> 18 for _ordinal, _offset, packed in parameters)
    return CubinFacts(kernels[0], found[REGISTER_COUNT], found[FRAME_SIZE], sizes, threads[0] if threads else ())


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("a cubin should be a 64-bit little-endian ELF file")
    table, entry_size, count, names_index = struct.unpack_from("<Q10xHHH", elf, 40)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + index * entry_size) for index in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, offset, size, *_ in headers:
        start = names + name
        has_no_bytes = kind == 8  # SHT_NOBITS
        yield elf[start : elf.index(0, start)].decode(), b"" if has_no_bytes else elf[offset : offset + size]


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == SIZED:
            yield attribute, section[at : at + value]
            at += value

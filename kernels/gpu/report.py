"""The table of GPU kernels in the documentation: what the compiler gave each, and what that lets one expect.

Owns the limits of GPU generations, the figures of the devices that times are predicted for, and the two formulas:
occupancy and roofline. Nothing here is measured, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .archive import ArchivedKernel
from .steps import Step, steps
from .variant import Work

REGISTERS, REGISTER_UNIT, WARPS_AT_ONCE = 65536, 256, 4
RESERVED_SHARED_BYTES = 1024  # of each block, for the system


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: warps and blocks at the same time, shared memory of all and of one block."""

    warps: int
    blocks: int
    shared_bytes: int

    @property
    def shared_bytes_a_block(self) -> int:
        return self.shared_bytes - RESERVED_SHARED_BYTES


# CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"; blocks as in the toolkit's
# cuda_occupancy.h.
LIMITS = {
    80: Limits(64, 32, 164 << 10),
    86: Limits(48, 16, 100 << 10),
    87: Limits(48, 16, 164 << 10),
    89: Limits(48, 24, 100 << 10),
    90: Limits(64, 32, 228 << 10),
    100: Limits(64, 32, 228 << 10),
    103: Limits(64, 32, 228 << 10),
    110: Limits(48, 24, 228 << 10),
    120: Limits(48, 24, 100 << 10),
    121: Limits(48, 24, 100 << 10),
}


@dataclass(frozen=True)
class Device:
    """A product that times are predicted for: its generation, and what its data sheet says.

    Attributes:
      bandwidth_gbps: memory, 10^9 bytes a second. int8_tops, fp16_tflops: tensor cores without sparsity, float32 sums.
      fp32_tflops: ordinary cores. source: which document.
    """

    name: str
    sm: int
    multiprocessors: int
    bandwidth_gbps: float
    int8_tops: float
    fp16_tflops: float
    fp32_tflops: float
    source: str


DEVICES = (
    Device("Jetson Orin Nano 8 GB (Super)", 87, 8, 102, 33, 17, 2.1, "Jetson Orin Nano Super data sheet"),
    Device("Jetson AGX Orin 64 GB", 87, 16, 204.8, 85, 42.5, 5.3, "Jetson AGX Orin technical brief"),
    Device("Jetson AGX Thor", 110, 20, 273, 517, 258, 8.1, "Jetson Thor data sheet; its FP8 rate for int8"),
    Device("RTX 4090", 89, 128, 1008, 661, 165, 82.6, "NVIDIA Ada GPU architecture"),
    Device("H200 SXM", 90, 132, 4800, 1979, 989, 67, "NVIDIA H200 data sheet"),
)

LAUNCH_US, GRAPH_LAUNCH_US = 3.0, 1.5
"""What one launch takes at least, on top of the work; the second in a CUDA graph. Assumed, not measured."""

# TensorRT-Edge-LLM 0.9.0, docs/source/user_guide/performance/performance-benchmarks.md; batch 1, a picture of about 349
# visual tokens.
PUBLISHED = (
    ("Jetson AGX Orin 64 GB", "Qwen2.5-VL 7B, INT4 AWQ, EAGLE3", "260.9 ms prefill", "64.4 tokens/s"),
    ("Jetson AGX Thor", "Qwen2.5-VL 7B, NVFP4, no speculation (0.7.1)", "31.0 ms prefill", "49.5 tokens/s"),
)


def occupancy(kernel: ArchivedKernel, sm: int) -> tuple[int, float]:
    """Blocks of a kernel that one multiprocessor holds at once, and the part of its warps that they fill."""
    limits = LIMITS[sm]
    registers_a_warp = -(-kernel.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // max(1, registers_a_warp) // WARPS_AT_ONCE * WARPS_AT_ONCE
    blocks = min(
        limits.blocks,
        limits.warps // kernel.num_warps,
        warps_by_registers // kernel.num_warps,
        limits.shared_bytes // (kernel.shared_bytes + RESERVED_SHARED_BYTES),
    )
    return blocks, blocks * kernel.num_warps / limits.warps


def predicted_us(work: Work, device: Device) -> tuple[float, str]:
    """Time of a call by the roofline, in microseconds, and what bounds it."""
    times = {
        "memory": work.bytes_moved / device.bandwidth_gbps / 1e3,
        "int8 tensor cores": work.int8_tensor_ops / device.int8_tops / 1e6,
        "fp16 tensor cores": work.fp16_tensor_ops / device.fp16_tflops / 1e6,
        "fp32 cores": work.fp32_ops / device.fp32_tflops / 1e6,
    }
    # Attention's two kinds of product take turns on the same tensor cores.
    times["tensor cores"] = times.pop("int8 tensor cores") + times.pop("fp16 tensor cores")
    bound = max(times, key=lambda name: times[name])
    return LAUNCH_US + times[bound], bound


def predicted_step_ms(step: Step, device: Device) -> float:
    """Time of a whole step by the roofline, in milliseconds, with the launches of a captured graph."""
    parts_us = sum(predicted_us(part, device)[0] - LAUNCH_US for part in step.parts)
    return (parts_us + step.launches * GRAPH_LAUNCH_US) / 1e3


def report(compiled: Mapping[int, tuple[int, Sequence[ArchivedKernel]]], work: Sequence[Work]) -> str:
    """The whole page, as Markdown."""
    sections = (_introduction(compiled), _kernel_table(compiled), _predictions(work), _step_table())
    return "\n".join(line for section in sections for line in section) + "\n"


def _introduction(compiled: Mapping[int, tuple[int, Sequence[ArchivedKernel]]]) -> list[str]:
    count = max((len(kernels) for _, kernels in compiled.values()), default=0)
    spilling = sum(kernel.spill_bytes > 0 for _, kernels in compiled.values() for kernel in kernels)
    spills = "No kernel keeps registers in local memory." if not spilling else f"{spilling} of them spill registers."
    return [
        "# GPU kernels: what the compiler gave, and what to expect",
        "",
        "Written by `python kernels/gpu/compile.py --report docs/gpu-kernels.md`, which needs no GPU. Nothing on this "
        "page was measured on a device: registers, shared memory and spills are read from the machine code, occupancy "
        "follows from them and from the limits of each generation (CUDA C++ Programming Guide, technical "
        "specifications per compute capability), and times are predictions.",
        "",
        f"{count} kernels, each for {len(compiled)} generations: "
        + ", ".join(f"sm_{sm} (driver for CUDA {version // 1000})" for sm, (version, _) in compiled.items())
        + f". {spills}",
        "",
    ]


def _kernel_table(compiled: Mapping[int, tuple[int, Sequence[ArchivedKernel]]]) -> list[str]:
    lines = [
        "## Registers, shared memory, occupancy",
        "",
        "Each cell: registers for one thread / bytes of shared memory for one block / part of a multiprocessor's warps "
        "that can be resident; with `spills n`, n bytes of local memory for one thread.",
        "",
        "| kernel | warps | " + " | ".join(f"sm_{sm}" for sm in compiled) + " |",
        "|---|---|" + "---|" * len(compiled),
    ]
    rows: dict[str, list[str]] = {}
    for sm, (_, kernels) in compiled.items():
        for kernel in kernels:
            row = rows.setdefault(kernel.name, [f"`{kernel.name}`", str(kernel.num_warps)])
            spills = f" spills {kernel.spill_bytes}" if kernel.spill_bytes else ""
            row.append(f"{kernel.registers} / {kernel.shared_bytes:,} / {occupancy(kernel, sm)[1]:.0%}{spills}")
    lines += ["| " + " | ".join(row) + " |" for row in rows.values()]
    return [*lines, ""]


def _predictions(work: Sequence[Work]) -> list[str]:
    lines = [
        "## Predicted times",
        "",
        "By the roofline: the longest of bytes over memory bandwidth and operations over the rate of their unit, plus "
        f"{LAUNCH_US:g} us for the launch. Real kernels reach 70 to 90 % of it when there is enough work to fill the "
        "device. `streamo-edge bench gpu --json` replaces these by measurements.",
        "",
        "| device | multiprocessors | GB/s | int8 TOPS | fp16 TFLOPS | fp32 TFLOPS | source |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {device.name} (sm_{device.sm}) | {device.multiprocessors} | {device.bandwidth_gbps:g} "
        f"| {device.int8_tops:g} | {device.fp16_tflops:g} | {device.fp32_tflops:g} | {device.source} |"
        for device in DEVICES
    ]
    lines += [
        "",
        "Microseconds for one call, and what bounds it:",
        "",
        "| kernel | case | MB moved | " + " | ".join(device.name for device in DEVICES) + " |",
        "|---|---|---|" + "---|" * len(DEVICES),
    ]
    for one in work:
        predictions = [predicted_us(one, device) for device in DEVICES]
        cells = " | ".join(f"{time_us:,.0f} ({bound})" for time_us, bound in predictions)
        lines.append(f"| `{one.variant}` | {one.case} | {one.bytes_moved / 1e6:,.2f} | {cells} |")
    return lines


def _step_table() -> list[str]:
    lines = [
        "",
        "## Predicted steps of whole models",
        "",
        "Milliseconds: weights of 4 bits in blocks of 32, an 8-bit head and cache, float16 products, "
        f"{GRAPH_LAUNCH_US:g} us for a launch in a graph. Memory and tensor cores at full rate: a device takes longer.",
        "",
        "| step | MB moved | " + " | ".join(device.name for device in DEVICES) + " |",
        "|---|---|" + "---|" * len(DEVICES),
    ]
    for step in steps():
        cells = " | ".join(f"{predicted_step_ms(step, device):,.1f}" for device in DEVICES)
        lines.append(f"| {step.name} | {step.bytes_moved / 1e6:,.0f} | {cells} |")
    lines += [
        "",
        "Beside it, what others measured: TensorRT-Edge-LLM 0.9.0's documentation, batch 1, about 349 visual tokens:",
        "",
        "| device | model | prefill | decode |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in PUBLISHED]
    lines += [
        "",
        "`streamo-edge bench gpu --json` on the device replaces these predictions.",
    ]
    return lines

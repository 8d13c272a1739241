"""What the GPU kernels take on this device, as parts of what the same device needs for a copy.

Owns the parts and the goals, and the products' cases. How things are timed is `gpu_timing`'s; attention and a whole
turn have files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.bench.gpu_attention import attention_cases, attention_row
from apps.bench.gpu_timing import SMALL_EFFORT, Call, Effort, keep_busy, same_bits, time_us
from apps.bench.gpu_turn import SMALL, THREE_B, turn_row
from apps.bench.kernel_cases import MatmulCase, matmul_data
from apps.bench.machine import available_cores, machine_card
from edge import gpu_operations as operations
from edge.gpu import DeviceArray, Gpu

HEADINGS = ("kernel", "us", "GB/s", "of a copy", "PyTorch SDPA us", "same bits", "goals")
OF_COPY = 0.7
"""What a product with one row and 4-bit weights should reach."""
GOALS = {"of_copy": "of a copy", "sdpa": "times PyTorch", "turns_a_second": "turns/s"}


def measure(
    parts: Sequence[str], *, device: int = 0, effort: Effort | None = None, small: bool = False
) -> dict[str, Any]:
    """Time the kernels.

    Args:
      parts: some of `matmul`, `attention` and `turn`; the copy is always measured.
      small: little sizes, to see that everything runs; the figures then say nothing.

    Returns:
      `machine`, `gpu` (facts), `copy_gbps` and `rows`: one for each case, with `us`, `gbps`, `of_copy`, `same_bits`,
      `sdpa_us` and `sdpa_form` where PyTorch sees the GPU, and `goals`: what was wanted and found, by name.
    """
    effort = effort or (SMALL_EFFORT if small else Effort())
    with Gpu(device) as gpu:
        streams = [gpu.make("stream") for _ in range(effort.side_by_side)]
        gpu.load()
        copy_gbps = _copy_gbps(gpu, streams[0], effort, small)
        rows = []
        if "matmul" in parts:
            rows += [_matmul_row(gpu, streams[0], case, effort) for case in matmul_cases(small)]
        if "attention" in parts:
            rows += [attention_row(gpu, streams, case, effort) for case in attention_cases(small)]
        if "turn" in parts:
            rows.append(turn_row(gpu, streams[0], SMALL if small else THREE_B, effort))
        for row in rows:
            row["of_copy"] = row["gbps"] / copy_gbps
            row["goals"] = _goals(row)
        facts = gpu.facts
        for stream in streams:
            gpu.destroy("stream", stream)
    return {"machine": machine_card(available_cores()), "gpu": vars(facts), "copy_gbps": copy_gbps, "rows": rows}


def _goals(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name what was wanted of a row, what was found (None: not measured), and whether that is reached."""
    figures = {**row, "sdpa": row["sdpa_us"] / row["us"]} if "sdpa_us" in row else row
    goals = {}
    for name, wanted in row.pop("wanted").items():
        found = figures.get(name)
        goals[name] = {"wanted": wanted, "found": found, "reached": found is not None and found >= wanted}
    return goals


def matmul_cases(small: bool) -> list[MatmulCase]:
    """Products of the 3B and the 7B: one row, and a turn's rows."""
    if small:
        return [MatmulCase(64, 64), MatmulCase(64, 64, 5, 8, gated=True)]
    sizes = ((2048, 11008), (3584, 18944))
    return [
        MatmulCase(inputs, outputs, rows, bits) for inputs, outputs in sizes for rows in (1, 144) for bits in (4, 8)
    ]


def copy_gbs(device: int = 0) -> float:
    """Bytes read and written in a second by the driver's own copy on the device, in 10^9."""
    with Gpu(device) as gpu:
        stream = gpu.make("stream")
        found = _copy_gbps(gpu, stream, Effort(), small=False)
        gpu.destroy("stream", stream)
    return found


def _copy_gbps(gpu: Gpu, stream: int, effort: Effort, small: bool) -> float:
    """Bytes read and written in a second by the driver's own copy on the device."""
    size = 1 << 16 if small else min(1 << 30, gpu.facts.free_bytes // 4)
    source, target = gpu.array(np.zeros(size, np.uint8)), gpu.empty(size, np.uint8)

    def copy(on: int) -> DeviceArray:
        gpu.call("copy", target.pointer, source.pointer, size, on)
        return target

    keep_busy(gpu, stream, copy, effort.warm_up_s)
    return 2 * size / time_us(gpu, [stream], [copy], effort.repeats) / 1e3


def _matmul_row(gpu: Gpu, stream: int, case: MatmulCase, effort: Effort) -> dict[str, Any]:
    data = matmul_data(case)
    input, output = gpu.array(data.input), gpu.empty((case.rows, case.width))

    def call_of(codes: DeviceArray, scales: DeviceArray) -> Call:
        def call(on: int) -> DeviceArray:
            shape = {"bits": case.bits, "block": case.block, "gated": case.gated}
            return operations.matmul(gpu, input, codes, scales, output=output, stream=on, **shape)  # type: ignore[arg-type]

        return call

    copies = effort.copies_of(case.weight_bytes)
    calls = [call_of(gpu.array(data.codes), gpu.array(data.scales)) for _ in range(copies)]
    us = time_us(gpu, [stream], calls, effort.repeats)
    moved = case.weight_bytes + data.input.nbytes + 4 * case.rows * case.width
    operations_done = 2 * case.rows * case.inputs * case.outputs
    return {
        "what": "matmul",
        "case": case.name,
        "us": us,
        "gbps": moved / us / 1e3,
        "tflops": operations_done / us / 1e6,
        "same_bits": same_bits(gpu, stream, calls[0], effort.same_runs),
        "wanted": {"of_copy": OF_COPY} if case.rows == 1 and case.bits == 4 else {},
    }


def table_rows(result: dict[str, Any]) -> list[tuple[object, ...]]:
    """The rows of the table under HEADINGS."""
    return [
        (
            f"{row['what']}, {row['case']}",
            f"{row['us']:.1f}",
            f"{row['gbps']:.0f}",
            f"{row['of_copy']:.0%}",
            f"{row['sdpa_us']:.1f}" if "sdpa_us" in row else "",
            "yes" if row["same_bits"] else "NO",
            ", ".join(_goal_text(name, goal) for name, goal in row["goals"].items()),
        )
        for row in result["rows"]
    ]


def _goal_text(name: str, goal: dict[str, Any]) -> str:
    if goal["found"] is None:
        return f"{goal['wanted']:g} {GOALS[name]}: not measured"
    return f"{goal['found']:.2f} of {goal['wanted']:g} {GOALS[name]}" + ("" if goal["reached"] else ": MISSED")

"""What the GPU kernels take on this device, as parts of what the same device needs for a copy.

Owns the cases and the timing: each case is recorded as one graph over different memory, enough of it that no cache
helps, and timed by the device's own events. Where PyTorch sees the GPU, its attention over a float16 cache stands
beside ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.bench.kernel_cases import AttentionCase, MatmulCase, Piece, attention_data, matmul_data
from apps.bench.machine import available_cores, machine_card
from edge import gpu_operations as operations
from edge.gpu import DeviceArray, Gpu

HEADINGS = ("kernel", "us", "GB/s", "of a copy", "PyTorch SDPA us", "same bits")
ON_HOST = ("new_slots", "spans")
WRITTEN = ("key_cache", "value_cache", "key_scales", "value_scales")

Call = Callable[[int], DeviceArray]  # puts the work on a stream


@dataclass(frozen=True)
class Effort:
    """How much is done: memory that a case goes through, timed rounds, and runs that must give the same bits."""

    working_set_bytes: int = 512 << 20
    repeats: int = 20
    same_runs: int = 200


def measure(
    parts: Sequence[str], *, device: int = 0, effort: Effort | None = None, small: bool = False
) -> dict[str, Any]:
    """Time the kernels.

    Args:
      parts: some of `matmul` and `attention`; the copy is always measured.
      small: little sizes, to see that everything runs; the figures then say nothing.

    Returns:
      `machine`, `gpu` (facts), `copy_gbps` and `rows`: one for each case, with `us`, `gbps`, `of_copy`, `same_bits`,
      and `sdpa_us` where PyTorch sees the GPU.
    """
    effort = effort or (Effort(1, 1, 2) if small else Effort())
    with Gpu(device) as gpu:
        stream = gpu.make("stream")
        gpu.load()
        copy_gbps = _copy_gbps(gpu, stream, effort, small)
        rows = []
        if "matmul" in parts:
            rows += [_matmul_row(gpu, stream, case, effort) for case in matmul_cases(small)]
        if "attention" in parts:
            rows += [_attention_row(gpu, stream, case, effort) for case in attention_cases(small)]
        for row in rows:
            row["of_copy"] = row["gbps"] / copy_gbps
        facts = gpu.facts
        gpu.destroy("stream", stream)
    return {"machine": machine_card(available_cores()), "gpu": vars(facts), "copy_gbps": copy_gbps, "rows": rows}


def matmul_cases(small: bool) -> list[MatmulCase]:
    """Products of the 3B and the 7B: one row, and a turn's rows."""
    if small:
        return [MatmulCase(64, 64), MatmulCase(64, 64, 5, 8, gated=True)]
    sizes = ((2048, 11008), (3584, 18944))
    return [
        MatmulCase(inputs, outputs, rows, bits) for inputs, outputs in sizes for rows in (1, 144) for bits in (4, 8)
    ]


def attention_cases(small: bool) -> list[AttentionCase]:
    """Heads of the 3B and the 7B: a token, and a turn of 144, at several depths."""
    if small:
        return [
            AttentionCase("small", pieces=(Piece(70),)),
            AttentionCase("small turn", new_tokens=3, pieces=(Piece(9),)),
        ]
    found = []
    for model, heads in (("3B", (16, 2)), ("7B", (28, 4))):
        for tokens, depths in ((1, (4096, 16384, 65536)), (144, (4096, 16384))):
            for depth in depths:
                name = f"{model}, {tokens} new at depth {depth:,}"
                found.append(AttentionCase(name, *heads, 128, tokens, (Piece(depth),)))
    return found


# ------------------------------------------------------------------------------------------------------------- timing


def time_us(gpu: Gpu, stream: int, calls: Sequence[Call], repeats: int) -> float:
    """Microseconds of one call: the median over rounds of a graph that makes each call once."""
    for call in calls:  # outside the graph first: workspaces grow, code is loaded
        call(stream)
    gpu.synchronize(stream)
    gpu.begin_graph(stream)
    for call in calls:
        call(stream)
    graph = gpu.end_graph(stream)
    begin, end = gpu.make("event"), gpu.make("event")
    found = []
    for _ in range(repeats + 1):
        gpu.record(begin, stream)
        gpu.run_graph(graph, stream)
        gpu.record(end, stream)
        found.append(gpu.elapsed_ms(begin, end) * 1e3 / len(calls))
    for what, handle in (("event", begin), ("event", end), ("graph", graph)):
        gpu.destroy(what, handle)
    return statistics.median(found[1:])


def same_bits(gpu: Gpu, stream: int, call: Call, runs: int) -> bool:
    """Whether `runs` runs of a call give the same bytes."""
    first = gpu.numpy(call(stream), stream).tobytes()
    return all(gpu.numpy(call(stream), stream).tobytes() == first for _ in range(runs - 1))


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

    return 2 * size / time_us(gpu, stream, [copy], effort.repeats) / 1e3


def _matmul_row(gpu: Gpu, stream: int, case: MatmulCase, effort: Effort) -> dict[str, Any]:
    data = matmul_data(case)
    input, output = gpu.array(data.input), gpu.empty((case.rows, case.width))

    def call_of(codes: DeviceArray, scales: DeviceArray) -> Call:
        def call(on: int) -> DeviceArray:
            shape = {"bits": case.bits, "block": case.block, "gated": case.gated}
            return operations.matmul(gpu, input, codes, scales, output=output, stream=on, **shape)  # type: ignore[arg-type]

        return call

    copies = _copies(case.weight_bytes, effort)
    calls = [call_of(gpu.array(data.codes), gpu.array(data.scales)) for _ in range(copies)]
    us = time_us(gpu, stream, calls, effort.repeats)
    moved = case.weight_bytes + data.input.nbytes + 4 * case.rows * case.width
    operations_done = 2 * case.rows * case.inputs * case.outputs
    return {
        "what": "matmul",
        "case": case.name,
        "us": us,
        "gbps": moved / us / 1e3,
        "tflops": operations_done / us / 1e6,
        "same_bits": same_bits(gpu, stream, calls[0], effort.same_runs),
    }


def _attention_row(gpu: Gpu, stream: int, case: AttentionCase, effort: Effort) -> dict[str, Any]:
    data = attention_data(case)
    arrays = data.arguments()
    heads = arrays.pop("query_heads")
    on_device = {
        name: gpu.array(value)
        for name, value in arrays.items()
        if value is not None and name not in (*ON_HOST, *WRITTEN)
    }
    on_host = {name: arrays[name] for name in ON_HOST}
    plan = operations.attention_table(
        **on_host, capacity=case.capacity, run_count=len(data.run_cos), most_spans=len(data.spans)
    )
    table, output = gpu.array(plan), gpu.empty((case.new_tokens, heads * case.head_dim))

    def call_of(caches: dict[str, DeviceArray]) -> Call:
        def call(on: int) -> DeviceArray:
            given = {**on_device, **on_host, **caches}
            return operations.attention(gpu, query_heads=heads, table=table, output=output, stream=on, **given)

        return call

    cache_bytes = 2 * case.kv_heads * case.depth * (case.head_dim + 4)
    copies = _copies(cache_bytes, effort)
    calls = [call_of({name: gpu.array(arrays[name]) for name in WRITTEN}) for _ in range(copies)]
    us = time_us(gpu, stream, calls, effort.repeats)
    row = {
        "what": "attention",
        "case": case.name,
        "us": us,
        "gbps": cache_bytes / us / 1e3,
        "same_bits": same_bits(gpu, stream, calls[0], effort.same_runs),
    }
    sdpa_us = _sdpa_us(case, copies, effort.repeats)
    return row if sdpa_us is None else {**row, "sdpa_us": sdpa_us}


def _copies(bytes: int, effort: Effort) -> int:
    return max(1, -(-effort.working_set_bytes // max(1, bytes)))


def _sdpa_us(case: AttentionCase, copies: int, repeats: int) -> float | None:
    """PyTorch's attention of the same shape over float16 caches; None where it sees no GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    attend = torch.nn.functional.scaled_dot_product_attention
    rows = case.depth + case.new_tokens
    half: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
    query = torch.randn(1, case.query_heads, case.new_tokens, case.head_dim, **half)
    caches = [torch.randn(2, 1, case.kv_heads, rows, case.head_dim, **half) for _ in range(copies)]
    # New tokens see the cache and themselves up to their place.
    seen = torch.ones(case.new_tokens, rows, dtype=torch.bool, device="cuda").tril(case.depth)
    mask = None if case.new_tokens == 1 else seen
    found = []
    for _ in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for keys, values in caches:
            attend(query, keys, values, attn_mask=mask, enable_gqa=True)
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / copies)
    return statistics.median(found[1:])


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
        )
        for row in result["rows"]
    ]

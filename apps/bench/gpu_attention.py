"""Attention over a cache on a GPU, timed: one call after the other, and several streams' side by side.

Owns the cases and their memory. What PyTorch takes for the same is `gpu_sdpa`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apps.bench.gpu_sdpa import fastest_sdpa
from apps.bench.gpu_timing import Call, Effort, same_bits, time_us
from apps.bench.kernel_cases import AttentionCase, Piece, attention_data
from edge import gpu_operations as operations
from edge.gpu import DeviceArray, Gpu

ON_HOST = ("new_slots", "spans")
WRITTEN = ("key_cache", "value_cache", "key_scales", "value_scales")
DEEP = 65536


@dataclass(frozen=True)
class Streams:
    """A call, and whether several streams make it side by side, each over a cache of its own.

    Attributes:
      goals: what it should reach: `of_copy`, a part of a copy's rate; `sdpa`, how many times as fast as PyTorch.
    """

    case: AttentionCase
    side_by_side: bool = False
    goals: tuple[tuple[str, float], ...] = ()


def attention_cases(small: bool) -> list[Streams]:
    """Heads of the 3B and the 7B: a token, and a turn of 144, at several depths."""
    if small:
        turn = AttentionCase("small turn", new_tokens=3, pieces=(Piece(9),))
        return [Streams(AttentionCase("small", pieces=(Piece(70),)), side_by_side=True), Streams(turn)]
    found = []
    for model, heads in (("3B", (16, 2)), ("7B", (28, 4))):
        for tokens, depths in ((1, (4096, 16384, DEEP)), (144, (4096, 16384))):
            for depth in depths:
                case = AttentionCase(f"{model}, {tokens} new at depth {depth:,}", *heads, 128, tokens, (Piece(depth),))
                goals = (("sdpa", 1.5),) if tokens > 1 and depth == 16384 else ()
                found.append(Streams(case, goals=goals))
                if tokens == 1 and depth == DEEP:
                    found.append(Streams(case, True, (("of_copy", 0.8), ("sdpa", 1.6))))
    return found


def attention_row(gpu: Gpu, streams: list[int], what: Streams, effort: Effort) -> dict[str, Any]:
    """One case's figures.

    Args:
      streams: to run side by side; a case that does not takes the first.
    """
    case = what.case
    lanes = streams if what.side_by_side else streams[:1]
    calls = _calls(gpu, case, max(effort.copies_of(_cache_bytes(case)), 2 * len(lanes)))
    us = time_us(gpu, lanes, calls, effort.repeats)
    row = {
        "what": "attention",
        "case": case.name + (f", {len(lanes)} streams" if what.side_by_side else ""),
        "us": us,
        "gbps": _cache_bytes(case) / us / 1e3,
        "same_bits": same_bits(gpu, lanes[0], calls[0], effort.same_runs),
        "wanted": dict(what.goals),
    }
    copies = len(calls)
    del calls  # PyTorch needs the memory
    fastest = fastest_sdpa(case, len(lanes), copies, effort.repeats)
    return row if fastest is None else {**row, "sdpa_us": fastest[0], "sdpa_form": fastest[1]}


def _cache_bytes(case: AttentionCase) -> int:
    return 2 * case.kv_heads * case.depth * (case.head_dim + 4)


def _calls(gpu: Gpu, case: AttentionCase, copies: int) -> list[Call]:
    """The same call over `copies` caches with the same contents."""
    data = attention_data(case)
    arrays = {name: value for name, value in data.arguments().items() if value is not None}
    heads = arrays.pop("query_heads")
    on_host = {name: arrays[name] for name in ON_HOST}
    on_device = {name: gpu.array(value) for name, value in arrays.items() if name not in (*ON_HOST, *WRITTEN)}
    plan = operations.attention_table(
        **on_host, capacity=case.capacity, run_count=len(data.run_cos), most_spans=len(data.spans)
    )
    table = gpu.array(plan)

    def call_of(caches: dict[str, DeviceArray]) -> Call:
        output = gpu.empty((case.new_tokens, heads * case.head_dim))

        def call(on: int) -> DeviceArray:
            given = {**on_device, **on_host, **caches}
            return operations.attention(gpu, query_heads=heads, table=table, output=output, stream=on, **given)

        return call

    return [call_of({name: gpu.array(arrays[name]) for name in WRITTEN}) for _ in range(copies)]

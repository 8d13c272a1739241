"""Attention kernels beside ONNX Runtime's GroupQueryAttention: one layer's call, over caches of many layers.

Owns which rows are measured. Ours adds the bias, turns queries and keys, rounds and appends; the stock operator is
given queries and keys that are already turned, and only appends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from apps.bench import timing
from apps.bench.kernel_cases import AttentionCase, Piece, angles, attention_data
from apps.bench.stock_operators import GroupQueryAttention, random_cache
from apps.bench.timing import Contestant, Times, Work
from edge import kernels_abi, native
from edge.backends.cache_memory import allocate_arrays
from edge.kernel_arguments import attention_arguments

DEPTH, NEW_TOKENS = 8192, 144
HEADS = {"3B": (16, 2, 128), "7B": (28, 4, 128)}
LAYERS = {"3B": 36, "7B": 28}
APPEND_LAYERS = 3
"""An append is bound by arithmetic, so a few layers are enough."""
OFFSET = "int8 with offset"
"""As in the layers of Qwen2.5 whose keys have a large bias, in 8 channels here."""
KV_TYPES = ("int8", OFFSET, "float32")
GOALS = {
    (what, kv): {timing.FASTEST: wanted}
    for what, wanted in (("append", 4.0), ("decode", 3.0))
    for kv in ("int8", OFFSET)
}


def measure(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of both sizes: append and decode, int8 and float32 caches."""
    rows = []
    with native.Threads(threads) as pool:
        for size in HEADS:
            for what, tokens in (("append", NEW_TOKENS), ("decode", 1)):
                layers = LAYERS[size] if tokens == 1 else APPEND_LAYERS
                contestants = _stock(size, tokens, layers, threads)
                for kv in KV_TYPES:
                    ours = OurAttention(HEADS[size], tokens, DEPTH, layers, kv, pool)
                    contestants[f"ours {kv}"] = Contestant(ours.run, layers)
                times = timing.interleave(contestants, rounds)
                for kv in KV_TYPES:
                    shape = f"{size}, {tokens} new at depth {DEPTH}, cache {kv}"
                    work = attention_work(HEADS[size], tokens, DEPTH, kv)
                    found = {"ours": times[f"ours {kv}"], **_against(times, tokens, kv)}
                    goals = GOALS.get((what, kv))
                    rows.append(timing.row(f"{what} attention", shape, threads, found, work, goals))
    return rows


def _against(times: Mapping[str, Times], tokens: int, kv: str) -> dict[str, Times]:
    """An append is compared with every form of the stock operator, decoding with those of the same cache, if any."""
    stock = {name: found for name, found in times.items() if not name.startswith("ours")}
    return {name: found for name, found in stock.items() if tokens > 1 or kv.split()[0] in name} or stock


def _stock(size: str, tokens: int, layers: int, threads: int) -> dict[str, Contestant]:
    """Each form of the stock operator that the installed version has."""
    found = {}
    forms = {"float32": "", "int8 per channel": "PER_CHANNEL", "int8 per tensor": "PER_TENSOR"}
    for name, quantised in forms.items():
        try:
            operator = GroupQueryAttention(HEADS[size], tokens, DEPTH, layers, threads, quantised)
            operator.run()
        except Exception:
            if not quantised:
                raise
            continue  # int8 caches came with 1.25
        found[f"GroupQueryAttention {name}"] = Contestant(operator.run, layers)
    return found


class OurAttention:
    """Our kernel over several layers' caches, with the C arguments made once."""

    def __init__(
        self, heads: tuple[int, int, int], tokens: int, depth: int, layers: int, kv: str, pool: native.Threads
    ) -> None:
        dtype = np.dtype(kv.split()[0])
        case = AttentionCase("speed", *heads, tokens, (Piece(64),), kv=dtype.name, offset=kv == OFFSET, sparse=True,
                             key_bias=20.0)  # fmt: skip
        given = attention_data(case).arguments()
        _, kv_heads, width = heads
        capacity = depth + tokens
        given["new_slots"] = np.arange(depth, capacity, dtype=np.int32)
        given["spans"] = np.array([(0, depth, 0)], np.int32)
        if kv == OFFSET:
            tables = angles(np.arange(capacity), width)
            given |= {"slot_cos": tables[0].astype(np.float32), "slot_sin": tables[1].astype(np.float32)}
        if dtype == np.int8:
            given |= {name: np.full((kv_heads, capacity), 0.02, np.float32) for name in ("key_scales", "value_scales")}
        self._library, self._pool = kernels_abi.load_library(), pool
        self._calls, self._kept = [], []
        arrays = allocate_arrays([((kv_heads, capacity, width), dtype.name)] * (2 * layers))
        for layer in range(layers):
            keys, values = arrays[2 * layer : 2 * layer + 2]
            for part, cache in enumerate((keys, values)):
                cache[:] = random_cache(cache.shape, dtype, 2 * layer + part)
            call = {**given, "scale": None, "key_cache": keys, "value_cache": values}
            arguments, _, kept = attention_arguments(call)
            self._calls.append(arguments)
            self._kept.append(kept)

    def run(self) -> None:
        """One call for each layer."""
        for arguments in self._calls:
            native.accept(self._library.streamo_attention_run(ctypes.byref(arguments), self._pool.pointer))


def attention_work(heads: tuple[int, int, int], tokens: int, depth: int, kv: str) -> Work:
    """Scores and sums over the cache and, causally, the new tokens; the cache read once."""
    query_heads, kv_heads, width = heads
    operations = 4 * query_heads * width * tokens * (depth + (tokens + 1) / 2)
    row_bytes = 4 * width if kv == "float32" else width + 4
    bound = "read_gbs" if tokens == 1 else ("f32_gops" if kv == "float32" else "int8_gops")
    return Work(operations, 2 * kv_heads * row_bytes * depth, bound)

"""One bundle in a process of its own, timed by the runtime's own backend: a frame, appends and decode steps by depth.

Owns the order of measurements and the contents of the cache, which is filled without computing: what its rows hold
decides nothing about time. A process of its own, so that the peak of its memory is the bundle's and nobody else's.
Writes lines of JSON: `{"done": 3, "total": 40}` as it goes on, then `{"result": ...}` or `{"error": ..., "hint": ...}`.

    python -m apps.bench.decoder_worker BUNDLE --backend cpu --threads 2 --depths 0,1024 --tokens 144 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge import contract
from edge.backends import load_backend
from edge.backends.base import CacheView
from edge.bundle import Bundle, open_bundle
from edge.errors import EdgeError, MemoryBudgetError
from edge.gpu_arrays import DeviceArray

FRAME_ROWS, FRAME_COLUMNS = 16, 30
"""Of patches: 420x224 pixels."""
DECODE_STEPS = 5
"""In each round, one after the other, at the same depth."""
SETTLE_S = 0.05


class Model:
    """A bundle's graphs with a cache full of random rows.

    Attributes:
      elapsed_ms: of the latest call.
      result: its logits (V,) or visual tokens (N, W).
    """

    def __init__(self, bundle: Bundle, backend: str, threads: int, capacity_tokens: int) -> None:
        self._manifest = bundle.manifest
        self._random = np.random.default_rng(0)
        self.backend: Any = load_backend(backend, bundle, threads=threads, check=False)
        self.backend.allocate_cache(capacity_tokens)
        self._fill_cache()

    def _fill_cache(self) -> None:
        pool = self._random.standard_normal(1 << 20, np.float32)
        for name, array in self.backend.cache.items():
            values = np.resize(_likely(name, len(array.shape), array.dtype, pool), array.shape)
            if isinstance(array, DeviceArray):
                self.backend.gpu.write(array, values)
            else:
                array[...] = values

    def encode(self, rows: int = FRAME_ROWS, columns: int = FRAME_COLUMNS) -> None:
        """One frame of `rows` x `columns` patches through the vision tower."""
        values = 3 * self._manifest.preprocess.patch_size**2
        patches = self._random.standard_normal((rows * columns, values), np.float32)
        self._timed(lambda: self.backend.encode(patches, rows, columns))

    def append(self, tokens: int, depth: int) -> None:
        """`tokens` new tokens behind `depth` cached ones."""
        facts = self._manifest.decoder_facts
        half = facts.head_dim // 2
        embeds = self._random.standard_normal((tokens, facts.hidden_size), np.float32)
        angles = np.arange(depth, depth + tokens)[:, None] / facts.rope_theta ** (np.arange(half) / half)
        view = CacheView(
            new_slots=np.arange(depth, depth + tokens, dtype=np.int32),
            spans=np.array([(0, depth, 0)] if depth else [], np.int32).reshape(-1, 3),
            run_cos=np.ones((1, half), np.float32),
            run_sin=np.zeros((1, half), np.float32),
        )
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._timed(lambda: self.backend.run_decoder(embeds, cos, sin, view))

    def _timed(self, run: Callable[[], Any]) -> None:
        start_ns = time.perf_counter_ns()
        self.result = np.asarray(run())  # also waits for a device
        self.elapsed_ms = (time.perf_counter_ns() - start_ns) / 1e6


def _likely(name: str, rank: int, dtype: np.dtype, normal: np.ndarray) -> np.ndarray:
    """What an array of the cache may hold, made of normally distributed numbers."""
    if dtype == np.int8:
        return np.clip(normal * 40, -127, 127).astype(np.int8)
    if rank == 3:  # scales
        return np.full_like(normal, 0.02)
    if name in (contract.SLOT_COS, contract.SLOT_SIN):
        return np.asarray((np.cos if name == contract.SLOT_COS else np.sin)(normal))
    return normal


def measure(
    bundle: Bundle,
    backend: str,
    threads: int,
    depths: list[int],
    tokens: int,
    repeats: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """All times, each round over everything, after one round that is not counted.

    Returns:
      `vision_ms`, and by depth `append_ms` and `decode_ms_per_token`: medians; the minima of the same under
      `..._min...`; by depth `turns_per_s`: a frame and an append, over and over; `load_s`; `rss_peak_mb` of this
      process; `native`, whether the decoder is the native graph.

    Raises:
      EdgeError: the bundle cannot be loaded, or its cache does not fit.
    """
    start_s = time.perf_counter()
    model = Model(bundle, backend, threads, max(depths) + tokens)
    load_s = time.perf_counter() - start_s
    vision: list[float] = []
    append: dict[int, list[float]] = {depth: [] for depth in depths}
    decode: dict[int, list[float]] = {depth: [] for depth in depths}
    for turn in range(repeats + 1):
        times: list[tuple[list[float], Callable[[], None], int]] = [(vision, model.encode, 1)]
        for depth in depths:
            times.append((append[depth], lambda depth=depth: model.append(tokens, depth), 1))  # type: ignore[misc]
            times.append((decode[depth], lambda depth=depth: model.append(1, depth), DECODE_STEPS))  # type: ignore[misc]
        for found, run, count in times:
            time.sleep(SETTLE_S)
            for _ in range(count):
                run()
                if turn:
                    found.append(model.elapsed_ms)
        progress(turn + 1, repeats + 1)
    return {
        "vision_ms": _median(vision),
        "append_ms": {str(depth): _median(found) for depth, found in append.items()},
        "decode_ms_per_token": {str(depth): _median(found) for depth, found in decode.items()},
        "vision_min_ms": round(min(vision), 3),
        "append_min_ms": {str(depth): round(min(found), 3) for depth, found in append.items()},
        "decode_min_ms_per_token": {str(depth): round(min(found), 3) for depth, found in decode.items()},
        "turns_per_s": {
            str(depth): round(1e3 / (statistics.median(vision) + statistics.median(found)), 3)
            for depth, found in append.items()
        },
        "load_s": round(load_s, 3),
        "rss_peak_mb": round(peak_bytes() / 1e6, 1),
        "native": model.backend.evicts_in_place,
        "notices": model.backend.notices,
        "placement": model.backend.placement,
    }


def _median(times_ms: list[float]) -> float:
    return round(statistics.median(times_ms), 3)


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):  # not getrusage: its peak is handed down from the process that started this
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--depths", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]

    def say(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    try:
        bundle = open_bundle(args.bundle, verify=False)
        report = lambda done, total: say(done=done, total=total)  # noqa: E731
        say(result=measure(bundle, args.backend, args.threads, depths, args.tokens, args.repeats, report))
    except MemoryError:
        say(error="Out of memory while the model was loaded", hint=None, code=MemoryBudgetError.exit_code)
    except EdgeError as error:
        say(error=error.message, hint=error.hint, code=error.exit_code)


if __name__ == "__main__":
    main()

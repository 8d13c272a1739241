"""One graph of a full-size model in a process of its own, timed on request.

Owns the graph's session, its caches and its inputs. A process for each contestant, so that their threads and memory
stay apart. Reads one JSON request a line, `{"tokens": 144, "depth": 4096}` or `{"rows": 16, "columns": 30}`, and
answers `{"ms": ...}`; the first line says `{"ready": name}`.

    python -m apps.bench.model_worker decoder.native.onnx --threads 2 --capacity 4240
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench.random_model import BASE, DECODERS, MERGE, PATCH, TOWERS
from edge import contract
from edge.backends.frame_tables import FrameTableCache
from edge.backends.ort_session import OrtSession
from edge.native import library_path
from edge.preprocess import PreprocessConfig

SETTLE_S = 0.05
DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(int32)": np.int32}


class Graph:
    """A loaded graph with its caches bound in place.

    Attributes:
      result: the latest logits (1, V) or visual tokens (N, W).
    """

    def __init__(self, path: Path, threads: int, capacity: int, size: str) -> None:
        native = ".native." in path.name
        weights = "int8" if "vision" in path.name else "int4"
        self._session = OrtSession(path, weights, threads=threads, library=library_path() if native else None)
        self._random = np.random.default_rng(0)
        self._capacity, self._decoder, self._tower = capacity, DECODERS[size], TOWERS[size]
        preprocess = PreprocessConfig(patch_size=PATCH, merge_size=MERGE)
        self._frames = FrameTableCache(self._tower, preprocess, native=native)
        self._kept: dict[str, np.ndarray] = {}
        self._bind_caches()

    def _bind_caches(self) -> None:
        for name, value in self._session.inputs.items():
            if contract.updated(name) not in self._session.outputs:
                continue
            shape = [self._capacity if isinstance(size, str) else size for size in value.shape]
            array = self._contents(name, shape, DTYPES[value.type])
            self._bind(name, array)
            self._session.bind_output(contract.updated(name), array)

    def _contents(self, name: str, shape: list[int], dtype: Any) -> np.ndarray:
        if dtype == np.int8:
            return self._random.integers(-127, 128, shape, np.int8)
        if "scales" in name:
            return np.full(shape, 0.02, np.float32)
        return np.resize(self._random.standard_normal(1 << 16, np.float32), shape)

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._kept[name] = array
        self._session.bind(name, array)

    def append(self, tokens: int, depth: int) -> float:
        """Milliseconds of `tokens` new tokens behind `depth` cached ones."""
        half = self._decoder.head_dim // 2
        angles = np.arange(self._capacity)[:, None] / 1e6 ** np.linspace(0, 1, half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        feeds = {
            contract.INPUTS_EMBEDS: self._random.standard_normal((tokens, self._decoder.hidden_size), np.float32),
            contract.ROPE_COS: cos[depth : depth + tokens].copy(),
            contract.ROPE_SIN: sin[depth : depth + tokens].copy(),
            contract.CACHE_LENGTH: np.array([depth], np.int32),
            contract.NEW_SLOTS: np.arange(depth, depth + tokens, dtype=np.int32),
            contract.SPANS: np.array([(0, depth, 0)] if depth else [], np.int32).reshape(-1, 3),
            contract.RUN_COS: np.ones((1, half), np.float32),
            contract.RUN_SIN: np.zeros((1, half), np.float32),
            contract.SLOT_COS: cos,
            contract.SLOT_SIN: sin,
        }
        return self._run(feeds, contract.LOGITS, (1, self._decoder.vocab_size))

    def encode(self, rows: int, columns: int) -> float:
        """Milliseconds of one frame of `rows` x `columns` patches."""
        patches = self._random.standard_normal((rows * columns, 3 * PATCH**2), np.float32)
        feeds = {contract.PATCHES: patches, **self._frames.of(rows, columns).feeds}
        return self._run(feeds, contract.IMAGE_EMBEDS, (rows * columns // MERGE**2, self._tower.out_hidden_size))

    def _run(self, feeds: dict[str, np.ndarray], output: str, shape: tuple[int, int]) -> float:
        self.result = np.empty(shape, np.float32)
        self._session.bind_output(output, self.result)
        for name in self._session.inputs.keys() & feeds.keys():
            self._bind(name, np.ascontiguousarray(feeds[name]))
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        self._session.run_bound()
        return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("graph", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--size", choices=tuple(DECODERS), default=BASE)
    args = parser.parse_args()
    graph = Graph(args.graph, args.threads, args.capacity, args.size)
    print(json.dumps({"ready": args.graph.name}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ms = graph.encode(**request) if "rows" in request else graph.append(**request)
        print(json.dumps({"ms": ms}), flush=True)


if __name__ == "__main__":
    main()

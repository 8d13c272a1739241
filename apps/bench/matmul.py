"""Products with quantised weights beside ONNX Runtime's MatMulNBits and, where it is at hand, OpenVINO.

Owns which rows are measured. Both read different weights in every call, enough of them to defeat the cache where the
product is bound by reading them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np

from apps.bench import timing
from apps.bench.stock_operators import MatMulNBits
from apps.bench.timing import Contestant, SelfTimed, Times, Work
from apps.bench.workers import Worker
from edge import kernels_abi, native
from edge.kernel_arguments import matmul_arguments

NEW_TOKENS = 144
ONE_ROW_BYTES = 600 << 20
"""Of weights, together more than any cache holds."""
MANY_ROWS_WEIGHTS = 3
SHAPES = {"3B": {"gate_up": (2048, 22016), "down": (11008, 2048)}, "7B": {"gate_up": (3584, 37888)}}
FORMS = ((NEW_TOKENS, 4, 128), (NEW_TOKENS, 4, 32), (NEW_TOKENS, 8, 32), (NEW_TOKENS, 8, 128), (1, 4, 128), (1, 4, 32))
"""Rows, bits, block."""
GOALS = {
    (True, 4): {"MatMulNBits": 2.0, "OpenVINO": 1.1, timing.PEAK: 0.65},
    (True, 8): {timing.FASTEST: 1.1},
    (False, 4): {timing.FASTEST: 1.0, timing.PEAK: 0.7},
}
"""By whether there are many rows, and bits."""
PEER = Path(__file__).resolve().parent / "peers" / "openvino_peer.py"


def measure(threads: int, rounds: int, openvino_python: str | None = None) -> list[dict[str, Any]]:
    """Rows of both sizes."""
    rows = []
    with native.Threads(threads) as pool:
        for size, shapes in SHAPES.items():
            for part, (inputs, outputs) in shapes.items():
                for tokens, bits, block in FORMS:
                    shape = (tokens, inputs, outputs, bits, block)
                    times = _times(shape, pool, rounds, openvino_python)
                    text = f"{size} {part}, {tokens} x {inputs} x {outputs}, {bits}-bit/{block}"
                    rows.append(timing.row("matrix product" if tokens > 1 else "one row", text, threads, times,
                                           matmul_work(*shape), GOALS[tokens > 1, bits]))  # fmt: skip
    return rows


def _times(
    shape: tuple[int, int, int, int, int], pool: native.Threads, rounds: int, openvino_python: str | None
) -> dict[str, Times]:
    tokens, inputs, outputs, bits, block = shape
    work = matmul_work(*shape)
    weights = MANY_ROWS_WEIGHTS if tokens > 1 else -(-ONE_ROW_BYTES // int(work.bytes))
    ours = OurProducts(*shape, weights, pool)
    stock = MatMulNBits(inputs, outputs, tokens, bits, block, weights, pool.count)
    contestants: dict[str, Contestant | SelfTimed] = {
        "ours": Contestant(ours.run, weights),
        "MatMulNBits": Contestant(stock.run, weights),
    }
    with contextlib.ExitStack() as stack:
        if openvino_python:
            given = {"inputs": inputs, "outputs": outputs, "bits": bits, "weights": weights}
            options = ["--threads", str(pool.count), "--block", str(block)]
            command = [openvino_python, str(PEER), "products", json.dumps(given), *options]
            worker = stack.enter_context(Worker("OpenVINO", command))
            contestants["OpenVINO"] = worker.contestant({"tokens": tokens}, weights)
        return timing.interleave(contestants, rounds)


class OurProducts:
    """Our kernel with several weights, packed, and the C arguments made once."""

    def __init__(
        self, rows: int, inputs: int, outputs: int, bits: int, block: int, weights: int, pool: native.Threads
    ) -> None:
        random = np.random.default_rng(13)
        self._weights = []
        for _ in range(weights):
            codes = np.frombuffer(random.bytes(inputs * outputs * bits // 8), np.uint8)
            if bits == 8:
                codes = np.maximum(codes.view(np.int8), -127)
            scales = random.random((inputs // block, outputs), np.float32) * np.float32(0.01)
            self._weights.append(native.Weights(codes, scales, bits=bits, block=block, threads=pool))
        given = random.standard_normal((rows, inputs), np.float32)
        shape = (inputs, outputs, False)
        self._arguments, _, self._kept = matmul_arguments(given, shape, None, None, None)
        self._library, self._pool = kernels_abi.load_library(), pool

    def run(self) -> None:
        """One product with each weight."""
        for weights in self._weights:
            status = self._library.streamo_matmul_run(
                weights.pointer, ctypes.byref(self._arguments), self._pool.pointer
            )
            native.accept(status)


def matmul_work(rows: int, inputs: int, outputs: int, bits: int, block: int) -> Work:
    """Operations, and bytes of codes and scales."""
    weights = inputs * outputs
    return Work(2 * rows * weights, weights * (bits / 8 + 4 / block), "int8_gops" if rows > 1 else "read_gbs")

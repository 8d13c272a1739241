"""One turn of a whole model on a GPU, by our kernels alone: a frame through the vision tower and its tokens behind a
cache, to the next token. Random weights, each layer's in memory of its own.

Owns the order of the operations, which is that of the native graphs, and their memory. Left out is what our kernels
do not do: the patches' embedding and the merger's GELU, and everything ONNX Runtime adds between two operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.bench.gpu_timing import Effort, same_bits, time_us
from edge import gpu_operations as operations
from edge.gpu import DeviceArray, Gpu

BLOCK = 32
WINDOW = 64
TURNS_A_SECOND = 60.0


@dataclass(frozen=True)
class TurnShape:
    """A model and a turn. Widths of the vision tower are those that export pads to whole blocks."""

    name: str
    layers: int = 36
    hidden: int = 2048
    inner: int = 11008
    query_heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    vocabulary: int = 151_936
    vision_layers: int = 32
    vision_hidden: int = 1280
    vision_inner: int = 3424
    vision_heads: int = 16
    full_every: int = 8
    patches: int = 480
    tokens: int = 144
    depth: int = 4096
    pool_bytes: int = 32 << 20


THREE_B = TurnShape("3B, a frame of 420x224 and 144 tokens at depth 4,096")
SMALL = TurnShape("small turn", 1, 128, 64, 2, 1, 64, 96, 1, 64, 32, 2, 2, 16, 4, 40, 1 << 12)


def turn_row(gpu: Gpu, stream: int, shape: TurnShape, effort: Effort) -> dict[str, Any]:
    """The turn's figures: `us`, `turns_a_second`, and the bytes of weights and cache."""
    turn = _Turn(gpu, shape)
    us = time_us(gpu, [stream], [turn.run], effort.repeats)
    return {
        "what": "turn",
        "case": f"{shape.name}, kernels alone",
        "us": us,
        "gbps": turn.memory.bytes_read / us / 1e3,
        "turns_a_second": 1e6 / us,
        "same_bits": same_bits(gpu, stream, turn.run, min(effort.same_runs, 20)),
        "wanted": {"turns_a_second": TURNS_A_SECOND},
    }


class _Memory:
    """Arrays of a turn: filled on the device, for random weights of gigabytes would take minutes from the host.

    Attributes:
      gpu: where they are. bytes_read: of weights and cache so far.
    """

    def __init__(self, gpu: Gpu, pool_bytes: int) -> None:
        self.gpu, self.bytes_read = gpu, 0
        self._pool = gpu.array(np.random.default_rng(0).integers(0, 256, pool_bytes, np.uint8))
        self._scratch: dict[tuple[str, int, int], DeviceArray] = {}

    def codes(self, *shape: int, dtype: Any = np.uint8) -> DeviceArray:
        found = self.gpu.empty(shape, dtype)
        self._spread(self._pool, found)
        self.bytes_read += found.nbytes
        return found

    def full(self, *shape: int, value: float) -> DeviceArray:
        found = self.gpu.empty(shape)
        self._spread(self.gpu.array(np.full(min(found.nbytes, self._pool.nbytes) // 4, value, np.float32)), found)
        return found

    def scales(self, *shape: int, value: float) -> DeviceArray:
        found = self.full(*shape, value=value)
        self.bytes_read += found.nbytes
        return found

    def scratch(self, name: str, rows: int, width: int) -> DeviceArray:
        """The same memory at each call: a recorded turn allocates nothing."""
        key = (name, rows, width)
        if key not in self._scratch:
            self._scratch[key] = self.gpu.empty((rows, width))
        return self._scratch[key]

    def _spread(self, pool: DeviceArray, target: DeviceArray) -> None:
        for start in range(0, target.nbytes, pool.nbytes):
            size = min(pool.nbytes, target.nbytes - start)
            self.gpu.call("copy", target.pointer + start, pool.pointer, size, None)
        self.gpu.synchronize()


class _Linear:
    """Quantised weights that keep numbers near 1."""

    def __init__(
        self, memory: _Memory, name: str, inputs: int, outputs: int, bits: int, *, gated: bool = False
    ) -> None:
        self._memory, self._name, self._bits, self._gated = memory, name, bits, gated
        self._width = outputs // 2 if gated else outputs
        self._codes = memory.codes(inputs, outputs * bits // 8)
        usual_code = 4.6 if bits == 4 else 74.0
        self._scales = memory.scales(inputs // BLOCK, outputs, value=inputs**-0.5 / usual_code)

    def __call__(self, rows: DeviceArray, on: int, **more: Any) -> DeviceArray:
        if "output" not in more:
            more["output"] = self._memory.scratch(self._name, rows.shape[0], self._width)
        shape: dict[str, Any] = {"bits": self._bits, "block": BLOCK, "gated": self._gated}
        return operations.matmul(self._memory.gpu, rows, self._codes, self._scales, stream=on, **shape, **more)


class _Layer:
    """What is around the attention of a layer."""

    def __init__(self, memory: _Memory, hidden: int, inner: int, qkv: int, attended: int, bits: int) -> None:
        self._memory = memory
        self.weight = memory.full(hidden, value=1.0)
        self._qkv = _Linear(memory, "qkv", hidden, qkv, bits)
        self._out = _Linear(memory, "out", attended, hidden, bits)
        self._gate = _Linear(memory, "gate", hidden, 2 * inner, bits, gated=True)
        self._down = _Linear(memory, "down", inner, hidden, bits)

    def before(self, x: DeviceArray, on: int) -> DeviceArray:
        return self._qkv(self.normed(x, on), on)

    def behind(self, attended: DeviceArray, x: DeviceArray, on: int) -> DeviceArray:
        """`x` with what the layer adds to it, in memory that all layers share."""
        total = self._memory.scratch("residual", *x.shape)
        x = self._out(attended, on, residual=x, output=total)
        inner = self._gate(self.normed(x, on), on)
        return self._down(inner, on, residual=x, output=total)

    def normed(self, x: DeviceArray, on: int) -> DeviceArray:
        output = self._memory.scratch("normed", *x.shape)
        return operations.rms_norm(self._memory.gpu, x, self.weight, epsilon=1e-6, output=output, stream=on)


class _Turn:
    def __init__(self, gpu: Gpu, shape: TurnShape) -> None:
        self.gpu, self.shape = gpu, shape
        self.memory = memory = _Memory(gpu, shape.pool_bytes)
        s, attended = shape, shape.query_heads * shape.head_dim
        qkv, wide = attended + 2 * s.kv_heads * s.head_dim, s.vision_hidden
        self._vision = [_Layer(memory, wide, s.vision_inner, 3 * wide, wide, 8) for _ in range(s.vision_layers)]
        self._merger = [
            _Linear(memory, "merged", 4 * wide, 4 * wide, 8),
            _Linear(memory, "visual", 4 * wide, s.hidden, 8),
        ]
        self._layers = [_Layer(memory, s.hidden, s.inner, qkv, attended, 4) for _ in range(s.layers)]
        self._caches = [self._cache() for _ in range(s.layers)]
        self._head = _Linear(memory, "logits", s.hidden, s.vocabulary, 8)
        random = np.random.default_rng(1)
        self._patches = gpu.array(random.standard_normal((s.patches, wide), np.float32))
        self._embeds = gpu.array(random.standard_normal((s.tokens, s.hidden), np.float32))
        self._angles_of_patches = self._angles(s.patches, wide // s.vision_heads)
        each = np.append(np.arange(0, s.patches, WINDOW), s.patches).astype(np.int32)
        self._windows = [(starts, gpu.array(starts)) for starts in (each, each[[0, -1]])]
        self._appended = self._append_arguments(memory.full(qkv, value=0.1))
        self._token = gpu.empty(1, np.int32)

    def _cache(self) -> dict[str, DeviceArray]:
        heads, rows, width = self.shape.kv_heads, self.shape.depth + self.shape.tokens, self.shape.head_dim
        return {
            "key_cache": self.memory.codes(heads, rows, width, dtype=np.int8),
            "value_cache": self.memory.codes(heads, rows, width, dtype=np.int8),
            "key_scales": self.memory.scales(heads, rows, value=0.01),
            "value_scales": self.memory.scales(heads, rows, value=0.01),
        }

    def _angles(self, rows: int, width: int) -> list[DeviceArray]:
        angles = np.random.default_rng(2).uniform(0, 2 * np.pi, (rows, width // 2))
        return [self.gpu.array(part.astype(np.float32)) for part in (np.cos(angles), np.sin(angles))]

    def _append_arguments(self, bias: DeviceArray) -> dict[str, Any]:
        """What all layers' attention is given."""
        s, half = self.shape, self.shape.head_dim // 2
        host: dict[str, Any] = {
            "new_slots": np.arange(s.depth, s.depth + s.tokens, dtype=np.int32),
            "spans": np.array([[0, s.depth, 0]], np.int32),
        }
        plan = operations.attention_table(**host, capacity=s.depth + s.tokens, run_count=1, most_spans=1)
        cos, sin = self._angles(s.tokens, s.head_dim)
        run_cos, run_sin = self.memory.full(1, half, value=1.0), self.memory.full(1, half, value=0.0)
        return {
            **host, "table": self.gpu.array(plan), "run_cos": run_cos, "run_sin": run_sin, "rope_cos": cos,
            "rope_sin": sin, "qkv_bias": bias, "query_heads": s.query_heads,
        }  # fmt: skip

    def run(self, on: int) -> DeviceArray:
        """Put the turn on a stream. Returns the logits."""
        s, visual = self.shape, self._see(on)
        start = self._embeds.pointer + 4 * s.hidden * (s.tokens - visual.shape[0])
        self.gpu.call("copy", start, visual.pointer, visual.nbytes, on)
        x, attended = self._embeds, self.memory.scratch("attended", s.tokens, s.query_heads * s.head_dim)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            qkv = layer.before(x, on)
            given: dict[str, Any] = {**self._appended, **cache}
            operations.attention(self.gpu, **given, qkv=qkv, output=attended, stream=on)
            x = layer.behind(attended, x, on)
        last = x.pointer + 4 * s.hidden * (s.tokens - 1)
        row = DeviceArray(last, (1, s.hidden), x.dtype, x.strides, x.owner)
        logits = self._head(self._layers[0].normed(row, on), on)
        operations.sample(self.gpu, logits, token=self._token, stream=on)
        return logits

    def _see(self, on: int) -> DeviceArray:
        """The frame's visual tokens."""
        s, x = self.shape, self._patches
        attended = self.memory.scratch("attended", s.patches, s.vision_hidden)
        for index, layer in enumerate(self._vision):
            qkv = layer.before(x, on)
            starts, device_starts = self._windows[(index + 1) % s.full_every == 0]
            cos, sin = self._angles_of_patches
            operations.window_attention(
                self.gpu, qkv, cos, sin, starts, heads=s.vision_heads, device_starts=device_starts,
                output=attended, stream=on,
            )  # fmt: skip
            x = layer.behind(attended, x, on)
        for linear in self._merger:
            x = linear(x.reshape(s.patches // 4, 4 * s.vision_hidden), on)
        return x

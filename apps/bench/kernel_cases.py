"""The one table of cases that the native kernels are tested and timed with, and the data of each.

Owns shapes and random data, made in float64 and rounded once. Knows no kernel: `arguments()` gives what
`edge.native.attention` takes, and everything else that wants the same numbers can take them from the dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

THETA = 1e6
"""Base of the rotary angles, as in Qwen2.5."""
LARGEST_CODE = 127


@dataclass(frozen=True)
class Piece:
    """Cached rows that lie side by side and belong to one run; `gap` rows before them belong to nobody."""

    length: int
    run: int = 0
    gap: int = 0


@dataclass(frozen=True)
class AttentionCase:
    """One call of the attention kernel.

    Attributes:
      shifts: by run, how many positions its rows have moved towards the start since they were written.
      key_bias: norm of the keys' bias in its 8 largest channels; Qwen2.5's first layer has about 605.
      offset: whether the keys' bias is kept out of the codes, or with `sparse` only its 8 largest channels.
      first_position: of the oldest cached row, as it was written.
    """

    name: str
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    new_tokens: int = 1
    pieces: tuple[Piece, ...] = ()
    shifts: tuple[int, ...] = (0,)
    kv: str = "int8"
    bias: bool = True
    key_bias: float = 0.0
    offset: bool = False
    sparse: bool = False
    first_position: int = 0
    spare_rows: int = 3

    @property
    def depth(self) -> int:
        """Cached rows that are attended to."""
        return sum(piece.length for piece in self.pieces)

    @property
    def capacity(self) -> int:
        """Rows of the cache."""
        return sum(piece.length + piece.gap for piece in self.pieces) + self.new_tokens + self.spare_rows


@dataclass
class AttentionData:
    """The arrays of a case, by the names of `edge.native.attention`; the caches are written by a call."""

    case: AttentionCase
    qkv: np.ndarray
    qkv_bias: np.ndarray | None
    rope_cos: np.ndarray
    rope_sin: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray
    new_slots: np.ndarray
    spans: np.ndarray
    run_cos: np.ndarray
    run_sin: np.ndarray
    key_scales: np.ndarray | None = None
    value_scales: np.ndarray | None = None
    key_offset: np.ndarray | None = None
    slot_cos: np.ndarray | None = None
    slot_sin: np.ndarray | None = None
    slot_positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    new_positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `edge.native.attention`; the arrays themselves, not copies."""
        names = ("qkv", "qkv_bias", "rope_cos", "rope_sin", "key_cache", "value_cache", "new_slots", "spans", "run_cos",
                 "run_sin", "key_scales", "value_scales", "key_offset", "slot_cos", "slot_sin")  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "query_heads": self.case.query_heads}

    def fresh(self) -> AttentionData:
        """The same data with caches of its own, so that two kernels can start from the same contents."""
        copy = AttentionData(**vars(self))
        for name in ("key_cache", "value_cache", "key_scales", "value_scales"):
            if getattr(self, name) is not None:
                setattr(copy, name, getattr(self, name).copy())
        return copy


def angles(positions: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (positions, D / 2) float64 of the rotary angles."""
    frequencies = THETA ** (-np.arange(head_dim // 2) / (head_dim // 2))
    turned = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.cos(turned), np.sin(turned)


def rotate(values: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn (..., D); element i pairs with element i + D / 2. cos and sin broadcast against (..., D / 2)."""
    half = values.shape[-1] // 2
    first, second = values[..., :half], values[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def quantise_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (..., D) int8 and scales (...) float32 of float32 rows: max|x| / 127, round half to even."""
    values = np.asarray(values, np.float32)
    scales = np.abs(values).max(-1) / np.float32(LARGEST_CODE)
    divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
    codes = np.clip(np.rint(values / divisors), -LARGEST_CODE, LARGEST_CODE)
    return codes.astype(np.int8), scales.astype(np.float32)


def attention_data(case: AttentionCase, seed: int = 0) -> AttentionData:
    """Random contents of a case; the cache holds rows that really were rotated, shifted and quantised."""
    random = np.random.default_rng(seed)
    heads, width, depth = case.kv_heads, case.head_dim, case.depth
    qkv = random.standard_normal((case.new_tokens, (case.query_heads + 2 * heads) * width)).astype(np.float32)
    bias = _bias(case, random) if case.bias else None
    spans, rows = _layout(case)
    free = np.setdiff1d(np.arange(case.capacity), rows)
    new_slots = np.sort(random.permutation(free)[: case.new_tokens]).astype(np.int32)
    written = np.zeros(case.capacity, np.int64)
    runs = np.repeat([piece.run for piece in case.pieces], [piece.length for piece in case.pieces]).astype(np.int64)
    moved = np.asarray(case.shifts, np.int64)
    written[rows] = case.first_position + np.arange(depth) + (moved[runs] if depth else 0)
    new_positions = case.first_position + depth + np.arange(case.new_tokens)
    written[new_slots] = new_positions
    rope_cos, rope_sin = angles(new_positions, width)
    run_cos, run_sin = angles(moved, width)
    slot_cos, slot_sin = angles(written, width)
    data = AttentionData(
        case, qkv, bias, _f32(rope_cos), _f32(rope_sin), *_caches(case), new_slots, spans, _f32(run_cos), _f32(run_sin),
        slot_positions=written, new_positions=new_positions,
    )  # fmt: skip
    _fill(data, rows, slot_cos[rows], slot_sin[rows], random)
    if case.offset:
        data.slot_cos, data.slot_sin = _f32(slot_cos), _f32(slot_sin)
    return data


def _bias(case: AttentionCase, random: np.random.Generator) -> np.ndarray:
    queries, keys = case.query_heads * case.head_dim, case.kv_heads * case.head_dim
    bias = 0.3 * random.standard_normal(queries + 2 * keys)
    if case.key_bias:
        bias[:queries] = 0  # else the scores of a strong key bias would leave one key with all the weight
        for head in range(case.kv_heads):
            loud = queries + head * case.head_dim + random.permutation(case.head_dim)[:8]
            bias[loud] = case.key_bias / np.sqrt(8) * random.choice([-1.0, 1.0], 8)
    return bias.astype(np.float32)


def _layout(case: AttentionCase) -> tuple[np.ndarray, np.ndarray]:
    """Spans (S, 3), and the slots that they name, in order."""
    spans, rows, slot = [], [], 0
    for piece in case.pieces:
        slot += piece.gap
        spans.append((slot, piece.length, piece.run))
        rows.append(np.arange(slot, slot + piece.length))
        slot += piece.length
    named = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return np.array(spans, np.int32).reshape(-1, 3), named.astype(np.int64)


def _caches(case: AttentionCase) -> tuple[np.ndarray, np.ndarray]:
    """Caches full of what must never be read: the largest code, or NaN."""
    shape = (case.kv_heads, case.capacity, case.head_dim)
    if case.kv == "int8":
        return np.full(shape, LARGEST_CODE, np.int8), np.full(shape, LARGEST_CODE, np.int8)
    return np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)


def _fill(data: AttentionData, rows: np.ndarray, cos: np.ndarray, sin: np.ndarray, random: np.random.Generator) -> None:
    """Write the cached rows as past calls would have."""
    case = data.case
    shape = (case.kv_heads, len(rows), case.head_dim)
    keys, values = random.standard_normal(shape), random.standard_normal(shape)
    key_bias, value_bias = biases(data)
    kept_out = key_bias * (np.abs(key_bias) >= np.sort(np.abs(key_bias))[:, -8:-7] if case.sparse else 1)
    if case.offset:
        data.key_offset = _f32(kept_out)
    if case.kv == "int8":
        kept = keys + key_bias[:, None] - (kept_out[:, None] if case.offset else 0)
        data.key_scales = np.full((case.kv_heads, case.capacity), np.nan, np.float32)
        data.value_scales = data.key_scales.copy()
        data.key_cache[:, rows], data.key_scales[:, rows] = quantise_rows(rotate(kept, cos, sin))
        data.value_cache[:, rows], data.value_scales[:, rows] = quantise_rows(values)
    else:
        data.key_cache[:, rows] = rotate(keys + key_bias[:, None], cos, sin)
        data.value_cache[:, rows] = values + value_bias[:, None]


def biases(data: AttentionData) -> tuple[np.ndarray, np.ndarray]:
    """The keys' and the values' bias, (Hkv, D) float64 each; zeros if the case has none."""
    case = data.case
    if data.qkv_bias is None:
        zeros = np.zeros((case.kv_heads, case.head_dim))
        return zeros, zeros
    both = data.qkv_bias[case.query_heads * case.head_dim :].astype(np.float64)
    keys, values = both.reshape(2, case.kv_heads, case.head_dim)
    return keys, values


def _f32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def attention_cases() -> list[AttentionCase]:
    """Every odd size once, and the pairs of them that have been trouble elsewhere."""
    cases = [
        AttentionCase(f"{tokens} new tokens, empty cache", new_tokens=tokens) for tokens in (1, 2, 63, 64, 65, 144)
    ]
    cases += [
        AttentionCase(f"{tokens} new tokens at depth {depth}", new_tokens=tokens, pieces=(Piece(depth),))
        for tokens, depth in (
            (1, 1),
            (1, 63),
            (1, 64),
            (1, 65),
            (1, 1000),
            (2, 1000),
            (63, 65),
            (64, 64),
            (65, 63),
            (144, 1000),
            (300, 130),
        )
    ]
    cases += [
        AttentionCase(f"heads {queries}/{keys} of {width}, {tokens} new", queries, keys, width, tokens, (Piece(200),))
        for queries, keys, width in ((16, 2, 128), (28, 4, 128), (4, 2, 80), (16, 16, 64), (2, 1, 16), (7, 1, 256))
        for tokens in (1, 17)
    ]
    ragged = (Piece(5), Piece(1, gap=3), Piece(0, gap=1), Piece(77, gap=2), Piece(64), Piece(0), Piece(130, gap=9))
    moved = tuple(Piece(p.length, run % 3, p.gap) for run, p in enumerate(ragged))
    many = tuple(Piece(1 + run % 5, run, run % 2) for run in range(64))
    for tokens in (1, 66):
        cases += [
            AttentionCase(f"ragged spans, {tokens} new", new_tokens=tokens, pieces=ragged),
            AttentionCase(f"three runs, {tokens} new", new_tokens=tokens, pieces=moved, shifts=(0, 40, 300)),
            AttentionCase(f"64 runs of a few tokens, {tokens} new", new_tokens=tokens, pieces=many,
                          shifts=tuple(range(0, 640, 10))),
            AttentionCase(f"only empty runs, {tokens} new", new_tokens=tokens, pieces=(Piece(0), Piece(0, 1)),
                          shifts=(0, 5)),
            AttentionCase(f"position 1e7, {tokens} new", new_tokens=tokens, pieces=(Piece(90), Piece(70, 1, 4)),
                          shifts=(0, 1 << 20), first_position=10_000_000),
            AttentionCase(f"no bias, {tokens} new", new_tokens=tokens, pieces=(Piece(100),), bias=False),
        ]  # fmt: skip
    return [_with_kv(case, kv) for case in cases for kv in ("float32", "int8")] + offset_cases()


def offset_cases() -> list[AttentionCase]:
    """int8 caches whose keys have a common part that is kept out of the codes."""
    runs = (Piece(70), Piece(33, 1, 2), Piece(1, 2, 1))
    return [
        AttentionCase(f"offset {norm:g}, heads {heads}, {tokens} new", *heads, width, tokens, pieces, (0, 25, 4000),
                      key_bias=norm, offset=True)
        for norm, heads, width, tokens, pieces in (
            (20.0, (4, 2), 64, 1, runs),
            (20.0, (4, 2), 64, 65, runs),
            (605.0, (16, 2), 128, 1, runs),
            (605.0, (16, 2), 128, 144, runs),
            (605.0, (28, 4), 128, 5, ()),
            (20.0, (4, 2), 80, 64, (Piece(64, 1),)),
        )
    ] + [
        AttentionCase(f"sparse offset 605, {tokens} new", 16, 2, 128, tokens, runs, (0, 25, 4000), key_bias=605.0,
                      offset=True, sparse=True)
        for tokens in (1, 65)
    ]  # fmt: skip


def _with_kv(case: AttentionCase, kv: str) -> AttentionCase:
    return AttentionCase(**{**vars(case), "kv": kv, "name": f"{case.name}, {kv}"})


@dataclass(frozen=True)
class MatmulCase:
    """One product with quantised weights: (rows, inputs) . (inputs, outputs)."""

    inputs: int
    outputs: int
    rows: int = 1
    bits: int = 4
    block: int = 32
    gated: bool = False
    bias: bool = False
    residual: bool = False

    @property
    def name(self) -> str:
        """Its sizes, for a test's name."""
        extras = [name for name in ("gated", "bias", "residual") if getattr(self, name)]
        return " ".join([f"{self.rows}x{self.inputs}x{self.outputs}, {self.bits} bits/{self.block}", *extras])

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.inputs * self.outputs * self.bits // 8 + 4 * self.inputs // self.block * self.outputs


@dataclass
class MatmulData:
    """The arrays of a product. `codes` as stored (packed for 4 bits), `values` the same codes one a byte."""

    case: MatmulCase
    input: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None

    def weights(self) -> np.ndarray:
        """(K, N) float64."""
        return self.values * np.repeat(self.scales.astype(np.float64), self.case.block, 0)


def matmul_data(case: MatmulCase, seed: int = 0) -> MatmulData:
    """Random contents of a case; the input's rows differ in size, and a few of its blocks are zero."""
    random = np.random.default_rng(seed)
    low, high = (-8, 7) if case.bits == 4 else (-LARGEST_CODE, LARGEST_CODE)
    values = random.integers(low, high, (case.inputs, case.outputs), np.int8, endpoint=True)
    scales = (0.5 + random.random((case.inputs // case.block, case.outputs))).astype(np.float32) / np.float32(high)
    given = random.standard_normal((case.rows, case.inputs)) * 10 ** random.uniform(-2, 2, (case.rows, 1))
    blocks = given.reshape(case.rows, -1, case.block)
    blocks[random.random(blocks.shape[:2]) < 0.05] = 0
    return MatmulData(
        case,
        given.astype(np.float32),
        pack_codes(values) if case.bits == 4 else values,
        values,
        scales,
        random.standard_normal(case.outputs).astype(np.float32) if case.bias else None,
        random.standard_normal((case.rows, case.width)).astype(np.float32) if case.residual else None,
    )


def pack_codes(values: np.ndarray) -> np.ndarray:
    """4-bit codes (K, N), two a byte, the first in the low half: (K, N / 2) uint8."""
    pairs = values.reshape(values.shape[0], -1, 2).view(np.uint8)
    return (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)


def matmul_cases() -> list[MatmulCase]:
    """Odd numbers of rows and columns, every block, and each thing that can be fused."""
    cases = [MatmulCase(256, 96, rows, bits) for bits in (4, 8) for rows in (1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 144)]
    cases += [
        MatmulCase(block * 3, 70, rows, bits, block)
        for bits in (4, 8)
        for rows in (1, 7)
        for block in (16, 32, 48, 64, 128, 256)
    ]
    cases += [MatmulCase(128, columns, rows, bits, 64) for bits in (4, 8) for rows in (1, 9)
              for columns in (2, 14, 16, 34, 130, 514)]  # fmt: skip
    for bits in (4, 8):
        for rows in (1, 20):
            cases += [
                MatmulCase(128, 92, rows, bits, bias=True),
                MatmulCase(128, 92, rows, bits, residual=True),
                MatmulCase(128, 92, rows, bits, bias=True, residual=True),
                MatmulCase(128, 92, rows, bits, gated=True),
                MatmulCase(128, 44, rows, bits, 128, gated=True, bias=True, residual=True),
                MatmulCase(2048, 320, rows, bits, 128),
            ]
    return [*cases, MatmulCase(256, 66, 300, 4, 64), MatmulCase(256, 66, 300, 8, 64)]

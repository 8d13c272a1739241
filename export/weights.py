"""The checkpoint's tensors to the weights that the graphs name: fused, transposed, converted, streamed to disk.

Owns which tensors make up which weight, and in which precision. Holds one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from edge.errors import CheckpointError
from export.checkpoint import EMBEDDING, HEAD, TEXT, VISUAL, Checkpoint
from export.key_offset import key_offset
from export.native import key_offset_name
from export.quantize import block_for, pack_int4, padded_width, quantize_blocks
from export.weight_store import Columns, StoredTensor, WeightFile

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
QUANTIZED = ("int8", "int4")
PIECE_VALUES = 4 << 20
FLOAT16_MAX = 65504.0

Step = Callable[[int, int], None]
"""Called as weights are written: (done, total)."""


@dataclass
class WeightWriter:
    """Writes named weights to one external-data file, and remembers where each lies.

    Args:
      block: rows (along K) that share a scale in int8 and int4 weights.
    """

    checkpoint: Checkpoint
    file: WeightFile
    block: int = 32
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    columns: dict[str, Columns] = field(default_factory=dict)  # where each tensor of a matrix went
    notes: list[str] = field(default_factory=list)

    def vector(self, name: str, *sources: str, width: int | None = None) -> None:
        """A norm's weight or a bias: always float32; several sources are joined, each filled up to `width` with 0."""
        parts = [self.checkpoint.read(source) for source in sources]
        self.array(name, np.concatenate([np.pad(part, (0, (width or len(part)) - len(part))) for part in parts]))

    def array(self, name: str, values: np.ndarray) -> None:
        """A float32 weight that is computed here."""
        self.stored[name] = self.file.append("float32", values.shape, [values.astype(np.float32)])

    def folded(self, name: str, source: str, dtype: str) -> None:
        """A convolution (N, channels, time, y, x) over equal frames as a linear map (channels y x, N), not quantised.

        Equal frames meet the sum of their weights over time.
        """
        values = self.checkpoint.read(source).astype(np.float64).sum(axis=2)
        values = values.reshape(len(values), -1).T.astype(np.float32)
        self.columns[source] = Columns(name, 0, values.shape[1])
        self.stored[f"{name}.weight"] = self.file.append(dtype, values.shape, [_convert(values, dtype, name)])

    def matrix(
        self, name: str, sources: list[str], dtype: str, *, rows: int | None = None, width: int | None = None
    ) -> None:
        """A linear map's weight `name`.weight (K, N), from tensors (N_i, K) that are joined along N.

        Args:
          rows: K is filled up to it with zeros.
          width: each N_i is filled up to it with zeros.
        """
        columns = _Columns(self.checkpoint, sources, rows, width)
        for source, first in zip(sources, columns.firsts, strict=True):
            self.columns[source] = Columns(name, first, first + self.checkpoint.entries[source].shape[0])
        block = block_for(columns.k, self.block) if dtype in QUANTIZED else None
        if dtype in QUANTIZED and (block is None or (dtype == "int4" and columns.n % 2)):
            self.notes.append(
                f"{name} stays float16: no block of 16 or more divides {columns.k}, or {columns.n} is odd"
            )
            block, dtype = None, "float16"
        elif block is not None and block != self.block:
            self.notes.append(f"{name} has blocks of {block}: K = {columns.k} is not a multiple of {self.block}")
        if dtype in ("float32", "float16"):
            pieces = (_convert(values, dtype, name) for values in columns.pieces(1))
            self.stored[f"{name}.weight"] = self.file.append(dtype, (columns.k, columns.n), pieces)
            return
        scales: list[np.ndarray] = []
        codes = self._codes(columns, block or 1, dtype, scales)
        self.stored[f"{name}.weight"] = self.file.append(dtype, (columns.k, columns.n), codes)
        shape = (columns.k // (block or 1), columns.n)
        self.stored[f"{name}.scale"] = self.file.append("float32", shape, scales)

    def table(self, name: str, source: str, dtype: str) -> None:
        """A weight that keeps its rows as they are: (rows, columns)."""
        shape = self.checkpoint.entries[source].shape
        pieces = self.checkpoint.rows(source, max(1, PIECE_VALUES // shape[1]))
        self.stored[name] = self.file.append(dtype, shape, (_convert(rows, dtype, name) for rows in pieces))

    @staticmethod
    def _codes(columns: _Columns, block: int, dtype: str, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
        for values in columns.pieces(block):
            codes, piece_scales = quantize_blocks(values, block, dtype)
            scales.append(piece_scales)
            yield pack_int4(codes) if dtype == "int4" else codes


class _Columns:
    """Tensors (N_i, K), held as stored and handed out transposed, some of K at a time, filled up with zeros."""

    def __init__(self, checkpoint: Checkpoint, sources: list[str], rows: int | None, width: int | None) -> None:
        self._parts = [checkpoint.columns(source) for source in sources]
        self.firsts: list[int] = []  # where each tensor's columns start
        self.n = 0
        for part in self._parts:
            self.firsts.append(self.n)
            self.n += width or part.shape[0]
        self._own_k = self._parts[0].shape[1]
        self.k = rows or self._own_k

    def pieces(self, multiple: int) -> Iterator[np.ndarray]:
        """(rows, N) float32, C-contiguous, rows a multiple of `multiple`; the last piece may be smaller."""
        rows = max(1, PIECE_VALUES // self.n // multiple) * multiple
        for first in range(0, self.k, rows):
            own = max(0, min(rows, self._own_k - first))
            piece = np.zeros((min(rows, self.k - first), self.n), np.float32)
            for part, column in zip(self._parts, self.firsts, strict=True):
                part.read_into(piece[:own, column : column + part.shape[0]], first)
            yield piece


def _convert(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    if dtype == "float32":
        return values
    largest = max(float(values.max()), -float(values.min()))
    if largest > FLOAT16_MAX:
        raise CheckpointError(
            f"Weight `{name}` holds {largest:.4g}, float16 ends at {FLOAT16_MAX:.0f}",
            hint="Export with `--weights fp32`",
        )
    return values.astype(np.float16)


def vision_precision(precision: str) -> str:
    """Precision of the vision tower beside a decoder of `precision`."""
    return "int8" if precision in QUANTIZED else precision


def write_embeddings(writer: WeightWriter, precision: str) -> None:
    """The token embeddings, as rows."""
    writer.table("embedding", EMBEDDING, "float32" if precision == "fp32" else "float16")


def write_vision(writer: WeightWriter, precision: str, step: Step) -> None:
    """Every weight of the vision graph. A tower's linear maps are quantised to 8 bits, never to 4."""
    depth = writer.checkpoint.facts.vision.depth
    dtype = PRECISIONS[vision_precision(precision)]
    writer.folded("patch_embed", VISUAL + "patch_embed.proj.weight", "float32" if precision == "fp32" else "float16")
    for block in range(depth):
        source, name = f"{VISUAL}blocks.{block}.", f"blocks.{block}."
        writer.vector(name + "norm1", source + "norm1.weight")
        _biased(writer, name + "qkv", [source + "attn.qkv"], dtype)
        _biased(writer, name + "attention_output", [source + "attn.proj"], dtype)
        writer.vector(name + "norm2", source + "norm2.weight")
        _mlp(writer, name, source + "mlp.", dtype, biased=True)
        step(block + 1, depth + 1)
    writer.vector("merger.norm", VISUAL + "merger.ln_q.weight")
    _biased(writer, "merger.hidden", [VISUAL + "merger.mlp.0"], dtype)
    _biased(writer, "merger.output", [VISUAL + "merger.mlp.2"], dtype)
    step(depth + 1, depth + 1)


def _biased(writer: WeightWriter, name: str, sources: list[str], dtype: str) -> None:
    writer.matrix(name, [f"{source}.weight" for source in sources], dtype)
    writer.vector(f"{name}.bias", *(f"{source}.bias" for source in sources))


def _mlp(writer: WeightWriter, name: str, source: str, dtype: str, *, biased: bool = False) -> None:
    """A gated MLP. Where no block divides its inner width, that is filled up with units that are always 0."""
    width = own_width = writer.checkpoint.entries[f"{source}down_proj.weight"].shape[1]
    if dtype in QUANTIZED:
        width = padded_width(own_width, writer.block)
    note = f"{name.partition('.')[0]}: MLPs are {width} wide inside, no block of 16 or more divides {own_width}"
    if width != own_width and note not in writer.notes:
        writer.notes.append(note)
    gate_up = [f"{source}gate_proj", f"{source}up_proj"]
    writer.matrix(f"{name}gate_up", [f"{part}.weight" for part in gate_up], dtype, width=width)
    if biased:
        writer.vector(f"{name}gate_up.bias", *(f"{part}.bias" for part in gate_up), width=width)
    writer.matrix(f"{name}down", [f"{source}down_proj.weight"], dtype, rows=width)
    if biased:
        writer.vector(f"{name}down.bias", f"{source}down_proj.bias")


def write_decoder(
    writer: WeightWriter, precision: str, embedding: StoredTensor, kv_dtypes: tuple[str, ...], step: Step
) -> None:
    """Every weight of the decoder graph. A tied head that is not quantised refers to the bytes of `embedding`."""
    facts = writer.checkpoint.facts.decoder
    dtype = PRECISIONS[precision]
    for layer in range(facts.layers):
        source, name = f"{TEXT}layers.{layer}.", f"layers.{layer}."
        attention = [f"{source}self_attn.{part}_proj" for part in "qkv"]
        writer.vector(name + "input_norm", source + "input_layernorm.weight")
        writer.matrix(name + "qkv", [f"{part}.weight" for part in attention], dtype)
        writer.vector(name + "qkv.bias", *(f"{part}.bias" for part in attention))
        writer.matrix(name + "attention_output", [source + "self_attn.o_proj.weight"], dtype)
        writer.vector(name + "post_norm", source + "post_attention_layernorm.weight")
        _mlp(writer, name, source + "mlp.", dtype)
        if kv_dtypes[layer] == "int8":
            _key_offset(writer, layer)
        step(layer + 1, facts.layers + 1)
    writer.vector("final_norm", TEXT + "norm.weight")
    if precision in QUANTIZED and block_for(facts.hidden_size, writer.block):
        writer.matrix("head", [writer.checkpoint.head_name], "int8")  # it decides between close tokens: never 4 bits
    elif facts.tied_embeddings:
        writer.stored["head.weight"] = embedding
    else:
        writer.table("head.weight", HEAD, "float32" if precision == "fp32" else "float16")
    step(facts.layers + 1, facts.layers + 1)


def _key_offset(writer: WeightWriter, layer: int) -> None:
    source, read = f"{TEXT}layers.{layer}.", writer.checkpoint.read
    keys, norm = source + "self_attn.k_proj.", read(source + "input_layernorm.weight")
    offset = key_offset(read(keys + "bias"), read(keys + "weight"), norm, writer.checkpoint.facts.decoder.head_dim)
    if offset is not None:
        writer.array(key_offset_name(layer), offset)

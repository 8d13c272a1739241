"""The checkpoint's tensors to the weights that the graphs name: fused, transposed, converted, streamed to disk.

Owns which tensors make up which weight, and in which precision. Holds one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge.contract import EmbeddingTable
from edge.errors import CheckpointError
from export.checkpoint import DECODER_MAPS, EMBEDDING, TEXT, VISUAL, Checkpoint
from export.key_offset import key_offset
from export.native import key_offset_name
from export.plan import PRECISIONS, QUANTIZED, Plan
from export.quantize import block_for, pack_int4, padded_width, quantize_blocks, quantize_rows
from export.weight_store import Columns, StoredTensor, WeightFile

PIECE_VALUES = 4 << 20
FLOAT16_MAX = 65504.0
EMBEDDING_BLOCK = 128
"""Columns of an int8 embedding table that share a scale."""

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
    rows: dict[str, Columns] = field(default_factory=dict)  # and each vector
    notes: list[str] = field(default_factory=list)

    def vector(self, name: str, *sources: str, width: int | None = None) -> None:
        """A norm's weight or a bias: always float32; several sources are joined, each filled up to `width` with 0."""
        parts = [self.checkpoint.read(source) for source in sources]
        first = 0
        for source, part in zip(sources, parts, strict=True):
            self.rows[source] = Columns(name, first, first + len(part))
            first += width or len(part)
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
        columns = MatrixColumns(self.checkpoint, sources, rows, width)
        dtype, block = self.fitting(name, columns, dtype)
        if dtype in ("float32", "float16"):
            self._place(name, columns)
            pieces = (_convert(values, dtype, name) for values in columns.pieces(1))
            self.stored[f"{name}.weight"] = self.file.append(dtype, (columns.k, columns.n), pieces)
            return
        scales: list[np.ndarray] = []
        self.codes(name, columns, dtype, block, self._nearest(columns, block, dtype, scales), scales)

    def fitting(self, name: str, columns: MatrixColumns, dtype: str) -> tuple[str, int]:
        """The dtype and block that a weight of this shape can have where `dtype` is wanted; says where they differ."""
        if dtype not in QUANTIZED:
            return dtype, 0
        block = block_for(columns.k, self.block)
        if block is None or (dtype == "int4" and columns.n % 2):
            self.notes.append(
                f"{name} stays float16: no block of 16 or more divides {columns.k}, or {columns.n} is odd"
            )
            return "float16", 0
        if block != self.block:
            self.notes.append(f"{name} has blocks of {block}: K = {columns.k} is not a multiple of {self.block}")
        return dtype, block

    def codes(
        self,
        name: str,
        columns: MatrixColumns,
        dtype: str,
        block: int,
        codes: Iterable[np.ndarray],
        scales: Iterable[np.ndarray],
    ) -> None:
        """A quantised weight: codes (K, N) int8 in pieces along K, then scales (K / block, N) float32 in pieces."""
        self._place(name, columns)
        packed = (pack_int4(piece) if dtype == "int4" else piece for piece in codes)
        self.stored[f"{name}.weight"] = self.file.append(dtype, (columns.k, columns.n), packed)
        self.stored[f"{name}.scale"] = self.file.append("float32", (columns.k // block, columns.n), scales)

    def _place(self, name: str, columns: MatrixColumns) -> None:
        for source, first in zip(columns.sources, columns.firsts, strict=True):
            self.columns[source] = Columns(name, first, first + self.checkpoint.entries[source].shape[0])

    def table(self, name: str, source: str, dtype: str) -> None:
        """A weight that keeps its rows as they are: (rows, columns). In int8 `name`.scale is beside it."""
        shape = self.checkpoint.entries[source].shape
        block = block_for(shape[1], EMBEDDING_BLOCK) if dtype == "int8" else None
        if dtype == "int8" and block is None:
            self.notes.append(f"{name} stays float16: no block of 16 or more divides {shape[1]}")
            dtype = "float16"
        pieces = self.checkpoint.rows(source, max(1, PIECE_VALUES // shape[1]))
        if block is None:
            self.stored[name] = self.file.append(dtype, shape, (_convert(rows, dtype, name) for rows in pieces))
            return
        scales: list[np.ndarray] = []

        def codes() -> Iterator[np.ndarray]:
            for rows in pieces:
                piece, piece_scales = quantize_rows(rows, block)
                scales.append(piece_scales)
                yield piece

        self.stored[name] = self.file.append("int8", shape, codes())
        self.stored[f"{name}.scale"] = self.file.append("float32", (shape[0], shape[1] // block), scales)

    @staticmethod
    def _nearest(columns: MatrixColumns, block: int, dtype: str, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
        for values in columns.pieces(block):
            codes, piece_scales = quantize_blocks(values, block, dtype)
            scales.append(piece_scales)
            yield codes


class MatrixColumns:
    """Tensors (N_i, K), held as stored and handed out transposed, some of K at a time, filled up with zeros."""

    def __init__(self, checkpoint: Checkpoint, sources: list[str], rows: int | None, width: int | None) -> None:
        self.sources = sources
        self._parts = [checkpoint.columns(source) for source in sources]
        self.firsts: list[int] = []  # where each tensor's columns start
        self.n = 0
        for part in self._parts:
            self.firsts.append(self.n)
            self.n += width or part.shape[0]
        self._own_k = self._parts[0].shape[1]
        self.k = rows or self._own_k

    def whole(self) -> np.ndarray:
        """All of it, (K, N) float32."""
        values, first = np.empty((self.k, self.n), np.float32), 0
        for piece in self.pieces(1):
            values[first : first + len(piece)] = piece
            first += len(piece)
        return values

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


def write_embeddings(writer: WeightWriter, precision: str) -> None:
    """The token embeddings, as rows."""
    writer.table("embedding", EMBEDDING, PRECISIONS[precision])


def embedding_table(stored: Mapping[str, StoredTensor]) -> EmbeddingTable:
    """What the manifest says of the token embeddings that were written."""
    table, scale = stored["embedding"], stored.get("embedding.scale")
    rows, columns = table.shape
    if scale is None:
        return EmbeddingTable(table.file, rows, columns, table.dtype)
    return EmbeddingTable(table.file, rows, columns, table.dtype, columns // scale.shape[1], scale.offset)


def write_vision(writer: WeightWriter, precision: str, step: Step) -> None:
    """Every weight of the vision graph; `precision` of its linear maps is fp32, fp16 or int8, never 4 bits."""
    depth = writer.checkpoint.facts.vision.depth
    dtype = PRECISIONS[precision]
    writer.folded("patch_embed", VISUAL + "patch_embed.proj.weight", "float32" if precision == "fp32" else "float16")
    for block in range(depth):
        source, name = f"{VISUAL}blocks.{block}.", f"blocks.{block}."
        writer.vector(name + "norm1", source + "norm1.weight")
        _biased(writer, name + "qkv", [source + "attn.qkv"], dtype)
        _biased(writer, name + "attention_output", [source + "attn.proj"], dtype)
        writer.vector(name + "norm2", source + "norm2.weight")
        width = inner_width(writer, name, source + "mlp.", quantized=dtype in QUANTIZED)
        gate_up = [f"{source}mlp.gate_proj", f"{source}mlp.up_proj"]
        writer.matrix(f"{name}gate_up", [f"{part}.weight" for part in gate_up], dtype, width=width)
        writer.vector(f"{name}gate_up.bias", *(f"{part}.bias" for part in gate_up), width=width)
        writer.matrix(f"{name}down", [f"{source}mlp.down_proj.weight"], dtype, rows=width)
        writer.vector(f"{name}down.bias", f"{source}mlp.down_proj.bias")
        step(block + 1, depth + 1)
    writer.vector("merger.norm", VISUAL + "merger.ln_q.weight")
    _biased(writer, "merger.hidden", [VISUAL + "merger.mlp.0"], dtype)
    _biased(writer, "merger.output", [VISUAL + "merger.mlp.2"], dtype)
    step(depth + 1, depth + 1)


def _biased(writer: WeightWriter, name: str, sources: list[str], dtype: str) -> None:
    writer.matrix(name, [f"{source}.weight" for source in sources], dtype)
    writer.vector(f"{name}.bias", *(f"{source}.bias" for source in sources))


def inner_width(writer: WeightWriter, name: str, source: str, *, quantized: bool) -> int:
    """The inner width of a gated MLP. Where no block divides it, it is filled up with units that are always 0."""
    own_width = writer.checkpoint.entries[f"{source}down_proj.weight"].shape[1]
    width = padded_width(own_width, writer.block) if quantized else own_width
    note = f"{name.partition('.')[0]}: MLPs are {width} wide inside, no block of 16 or more divides {own_width}"
    if width != own_width and note not in writer.notes:
        writer.notes.append(note)
    return int(width)


def write_decoder(
    writer: WeightWriter, plan: Plan, embedding: StoredTensor, kv_dtypes: tuple[str, ...], step: Step
) -> None:
    """Every weight of the decoder graph, each rounded by itself."""
    facts = writer.checkpoint.facts.decoder
    for layer in range(facts.layers):
        write_layer_vectors(writer, layer)
        for name, columns in layer_maps(writer, plan, layer).items():
            writer.matrix(name, columns.sources, plan.dtype(name), rows=columns.rows, width=columns.width)
        if kv_dtypes[layer] == "int8":
            offset = bias_offset(writer.checkpoint, layer)
            if offset is not None:
                writer.array(key_offset_name(layer), offset)
        step(layer + 1, facts.layers + 1)
    write_head(writer, plan, embedding)
    step(facts.layers + 1, facts.layers + 1)


def write_layer_vectors(writer: WeightWriter, layer: int) -> None:
    """The norms of a decoder layer, and the bias of its qkv."""
    source, name = f"{TEXT}layers.{layer}.", f"layers.{layer}."
    writer.vector(name + "input_norm", source + "input_layernorm.weight")
    writer.vector(name + "qkv.bias", *(f"{source}self_attn.{part}_proj.bias" for part in "qkv"))
    writer.vector(name + "post_norm", source + "post_attention_layernorm.weight")


@dataclass(frozen=True)
class MapSource:
    """Which tensors a decoder layer's map consists of; `rows` and `width` as in `WeightWriter.matrix`."""

    sources: list[str]
    rows: int | None = None
    width: int | None = None


def layer_maps(writer: WeightWriter, plan: Plan, layer: int) -> dict[str, MapSource]:
    """The maps of a decoder layer by name, in the order in which a token meets them."""
    source, name = f"{TEXT}layers.{layer}.", f"layers.{layer}."
    quantized = any(plan.precision(f"{name}{part}") in QUANTIZED for part in ("gate_up", "down"))
    width = inner_width(writer, name, source + "mlp.", quantized=quantized)
    filled: dict[str, dict[str, int]] = {"gate_up": {"width": width}, "down": {"rows": width}}
    return {
        name + part: MapSource([f"{source}{tensor}.weight" for tensor in tensors], **filled.get(part, {}))
        for part, tensors in DECODER_MAPS.items()
    }


def write_head(writer: WeightWriter, plan: Plan, embedding: StoredTensor) -> None:
    """The last norm and the head. A tied head that is not quantised refers to the bytes of `embedding` if it can."""
    facts = writer.checkpoint.facts.decoder
    writer.vector("final_norm", TEXT + "norm.weight")
    if plan.head == "int8" and block_for(facts.hidden_size, writer.block):
        writer.matrix("head", [writer.checkpoint.head_name], "int8")  # it decides between close tokens: never 4 bits
        return
    dtype = "float32" if plan.head == "fp32" else "float16"
    if facts.tied_embeddings and embedding.dtype == dtype:
        writer.stored["head.weight"] = embedding
    else:
        writer.table("head.weight", writer.checkpoint.head_name, dtype)


def bias_offset(checkpoint: Checkpoint, layer: int) -> np.ndarray | None:
    """The part of a layer's key bias that stays out of an int8 cache, by the rule of `key_offset`."""
    source, read = f"{TEXT}layers.{layer}.", checkpoint.read
    keys, norm = source + "self_attn.k_proj.", read(source + "input_layernorm.weight")
    return key_offset(read(keys + "bias"), read(keys + "weight"), norm, checkpoint.facts.decoder.head_dim)

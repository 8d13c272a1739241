"""The checkpoint's tensors to the weights that the graphs name: fused, transposed, converted, streamed to disk.

Owns which tensors make up which weight, and in which precision. Holds one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from edge.errors import CheckpointError
from export.checkpoint import EMBEDDING, HEAD, TEXT, VISUAL, Checkpoint
from export.quantize import block_for, pack_int4, quantize_blocks
from export.safetensors_file import read_raw, to_float32
from export.weight_store import Columns, StoredTensor, WeightFile

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
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

    def vector(self, name: str, *sources: str) -> None:
        """A norm's weight or a bias: always float32; several sources are joined."""
        values = np.concatenate([self.checkpoint.read(source) for source in sources])
        self.stored[name] = self.file.append("float32", values.shape, [values])

    def matrix(self, name: str, sources: list[str], dtype: str) -> None:
        """A linear map's weight `name`.weight (K, N), from tensors (N_i, K) that are joined along N."""
        columns = _Columns(self.checkpoint, sources)
        first = 0
        for source in sources:
            last = first + self.checkpoint.entries[source].shape[0]
            self.columns[source] = Columns(name, first, last)
            first = last
        block = block_for(columns.k, self.block) if dtype in ("int8", "int4") else None
        if dtype in ("int8", "int4") and (block is None or (dtype == "int4" and columns.n % 2)):
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
    """Tensors (N_i, K), read whole as stored and handed out transposed, some of K at a time."""

    def __init__(self, checkpoint: Checkpoint, sources: list[str]) -> None:
        self._parts = []
        for source in sources:
            entry = checkpoint.entries[source]
            self._parts.append((read_raw(entry).reshape(entry.shape[0], -1), entry))
        self.k = self._parts[0][0].shape[1]
        self.n = sum(raw.shape[0] for raw, _ in self._parts)

    def pieces(self, multiple: int) -> Iterator[np.ndarray]:
        """(rows, N) float32, C-contiguous, rows a multiple of `multiple`; the last piece may be smaller."""
        rows = max(1, PIECE_VALUES // self.n // multiple) * multiple
        for first in range(0, self.k, rows):
            parts = [to_float32(raw[:, first : first + rows], entry).T for raw, entry in self._parts]
            yield np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)


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
    writer.table("embedding", EMBEDDING, "float32" if precision == "fp32" else "float16")


def write_vision(writer: WeightWriter, precision: str, step: Step) -> None:
    """Every weight of the vision graph. The tower is not quantised."""
    depth = writer.checkpoint.facts.vision.depth
    dtype = "float32" if precision == "fp32" else "float16"
    writer.matrix("patch_embed", [VISUAL + "patch_embed.proj.weight"], dtype)
    for block in range(depth):
        source, name = f"{VISUAL}blocks.{block}.", f"blocks.{block}."
        writer.vector(name + "norm1", source + "norm1.weight")
        _biased(writer, name + "qkv", [source + "attn.qkv"], dtype)
        _biased(writer, name + "attention_output", [source + "attn.proj"], dtype)
        writer.vector(name + "norm2", source + "norm2.weight")
        _biased(writer, name + "gate_up", [source + "mlp.gate_proj", source + "mlp.up_proj"], dtype)
        _biased(writer, name + "down", [source + "mlp.down_proj"], dtype)
        step(block + 1, depth + 1)
    writer.vector("merger.norm", VISUAL + "merger.ln_q.weight")
    _biased(writer, "merger.hidden", [VISUAL + "merger.mlp.0"], dtype)
    _biased(writer, "merger.output", [VISUAL + "merger.mlp.2"], dtype)
    step(depth + 1, depth + 1)


def _biased(writer: WeightWriter, name: str, sources: list[str], dtype: str) -> None:
    writer.matrix(name, [f"{source}.weight" for source in sources], dtype)
    writer.vector(f"{name}.bias", *(f"{source}.bias" for source in sources))


def write_decoder(writer: WeightWriter, precision: str, embedding: StoredTensor, step: Step) -> None:
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
        writer.matrix(name + "gate_up", [source + "mlp.gate_proj.weight", source + "mlp.up_proj.weight"], dtype)
        writer.matrix(name + "down", [source + "mlp.down_proj.weight"], dtype)
        step(layer + 1, facts.layers + 1)
    writer.vector("final_norm", TEXT + "norm.weight")
    if precision in ("int8", "int4") and block_for(facts.hidden_size, writer.block):
        writer.matrix("head", [writer.checkpoint.head_name], "int8")  # it decides between close tokens: never 4 bits
    elif facts.tied_embeddings:
        writer.stored["head.weight"] = embedding
    else:
        writer.table("head.weight", HEAD, "float32" if precision == "fp32" else "float16")
    step(facts.layers + 1, facts.layers + 1)

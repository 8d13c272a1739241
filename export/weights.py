"""Which of the checkpoint's tensors make up which weight of the graphs, and in which precision each is written.

Owns the names. How a weight is written is `weight_writer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge.contract import EmbeddingTable
from export.checkpoint import Checkpoint
from export.key_offset import key_offset
from export.native import key_offset_name
from export.plan import PRECISIONS, QUANTIZED, Plan
from export.quantize import block_for, padded_width
from export.tensor_names import DECODER_MAPS, EMBEDDING, TEXT, VISUAL
from export.weight_store import StoredTensor
from export.weight_writer import Step, WeightWriter


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

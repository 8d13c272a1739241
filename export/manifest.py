"""What a bundle's manifest says of an export: where the weights are from, what was written, and how it was proved.

Owns the choice of facts. The schema is `edge.contract`'s.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from edge import contract
from edge.contract import Component, FileFacts, Manifest
from edge.prompt import STREAMO
from export.checkpoint import Checkpoint
from export.components import PRODUCER, WrittenDecoder
from export.native import key_offset_name
from export.source import Source
from export.weight_store import StoredTensor
from export.weight_writer import WeightWriter
from export.weights import embedding_table


def build_manifest(
    source: Source,
    files: Mapping[str, FileFacts],
    table: Mapping[str, StoredTensor],
    vision: tuple[Component, WeightWriter],
    decoder: WrittenDecoder,
    parity: dict[str, Any],
) -> Manifest:
    """What is to be known of a bundle that is written.

    Args:
      files: all that is in it.
      table: as `add_embedding` returns it; `vision` and `decoder` as the others do.
    """
    checkpoint, (tower, vision_writer) = source.checkpoint, vision
    return Manifest(
        schema=contract.MANIFEST_SCHEMA,
        tool=_tool(),
        source=_provenance(checkpoint, [*source.notes, *vision_writer.notes, *decoder.writer.notes]),
        decoder_facts=checkpoint.facts.decoder,
        vision_facts=checkpoint.facts.vision,
        preprocess=source.preprocess,
        protocol=STREAMO,
        tokens=source.tokens,
        embedding=embedding_table(table),
        vision=tower,
        decoder=decoder.component,
        kv_dtypes=decoder.kv_dtypes,
        files=dict(sorted(files.items())),
        stream=source.stream.defaults,
        parity=parity,
        key_offset_layers=_key_offset_layers(decoder.writer),
        precision=decoder.precision,
        kv_layers=tuple(decoder.kv_layers),
        stored_turns=contract.TURNS_FILE,
    )


def _key_offset_layers(writer: WeightWriter) -> tuple[int, ...]:
    layers = range(writer.checkpoint.facts.decoder.layers)
    return tuple(layer for layer in layers if key_offset_name(layer) in writer.stored)


def _provenance(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    source: dict[str, Any] = {
        "name": checkpoint.folder.resolve().name,
        "architecture": "Qwen2_5_VLForConditionalGeneration",
        "config_sha256": checkpoint.config_sha256,
        "tensors": len(checkpoint.entries),
        "parameters": checkpoint.parameters,
        "dtype": checkpoint.dtype,
    }
    if checkpoint.adapter:
        source["adapter"] = checkpoint.adapter.provenance()
    return {**source, "notes": notes} if notes else source


def _tool() -> str:
    try:
        return f"{PRODUCER} {importlib.metadata.version(PRODUCER)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PRODUCER} (not installed)"

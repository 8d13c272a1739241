"""The whole way from a checkpoint folder to a bundle.

Owns the order of the steps. Each step is a module of its own.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edge import contract
from edge.contract import Component, EmbeddingTable, Manifest, TokenIds
from edge.errors import UsageError
from edge.preprocess import PreprocessConfig
from edge.prompt import STREAMO
from export.adapter import open_adapter
from export.bundle_writer import BundleWriter
from export.checkpoint import Checkpoint, open_checkpoint
from export.decoder import build_decoder
from export.expected import compute_expected, load_expected, save_expected
from export.known_hashes import check_files, known_hash
from export.merge import with_adapter
from export.native import NativeOperators, key_offset_name, unsupported
from export.onnx_writer import GraphBuilder
from export.parity import require_parity
from export.preflight import Preflight, bundle_bytes, disk_free_bytes, memory_bytes
from export.probe import Probe, build_probe
from export.proof import Written, prove
from export.reference import require_packages
from export.resume import resume_key
from export.stock import Operators
from export.stream_attention import stream_attention_function
from export.stream_config import PREPROCESSOR_FILE, StreamFile, read_preprocess, read_stream_file
from export.tokens import read_tokenizer, token_ids
from export.vision import build_vision
from export.weight_store import StoredTensor, WeightFile
from export.weights import (
    PRECISIONS,
    QUANTIZED,
    Step,
    WeightWriter,
    vision_precision,
    write_decoder,
    write_embeddings,
    write_vision,
)

Progress = Callable[[str, int, int], None]
"""Called as the export goes on: (stage, done, total). Stages: hashes (where some are known), embeddings, vision,
decoder, parity."""

VISION_DATA = "vision.data"
DECODER_DATA = "decoder.data"
PRODUCER = "streamo-edge"
KV_DTYPES = {"fp32": "float32", "int8": "int8"}
BLOCK_SIZES = (16, 32, 64, 128, 256)


def export_checkpoint(
    checkpoint_dir: str | Path,
    bundle_dir: str | Path,
    *,
    weights: str = "fp32",
    kv: str | None = None,
    block_size: int = 32,
    allow_mismatch: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
) -> Manifest:
    """Export a Qwen2.5-VL checkpoint with Streamo's state tokens as a bundle.

    Args:
      checkpoint_dir: a Hugging Face folder; only files directly in it are read.
      bundle_dir: the folder to create.
      weights: fp32, fp16, int8 or int4, of the decoder's linear maps. The vision tower is int8 for int8 and int4.
      kv: fp32 or int8, of the native decoder's KV cache; None: int8 with weights of int8 or int4, else fp32. The stock
        decoder's cache is always fp32.
      block_size: weights along K that share a scale in int8 and int4.
      allow_mismatch: write the bundle even if it does not compute what PyTorch computes.
      progress: called as (stage, done, total).
      overwrite: replace an existing bundle.
      reference: a record by `record_reference`, to compare with instead of PyTorch on the spot; with it neither torch
        nor transformers is needed.
      adapter: a LoRA adapter's folder in PEFT's layout, merged into the checkpoint tensor by tensor.

    Returns:
      The manifest that was written.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
      ParityError: the graphs differ from PyTorch by more than the precision explains; nothing is left behind.
      OutputError: the bundle cannot be written.
      UsageError: an argument is not usable.
    """
    _check_arguments(weights, kv, block_size)
    report = progress or (lambda stage, done, total: None)
    source = _open(Path(checkpoint_dir), adapter)
    checkpoint = source.checkpoint
    precisions, native = _precisions(source, weights, kv, block_size)
    recorded = load_expected(Path(reference), checkpoint, source.probe) if reference else None
    if recorded is None:
        require_packages()
    options = {"weights": weights, "block_size": block_size, "kv_dtypes": precisions.kv_dtypes}
    key = resume_key(checkpoint, {contract.TOKENIZER_FILE: source.tokenizer}, options)
    needed_bytes = bundle_bytes(checkpoint, weights, block_size)
    with BundleWriter(Path(bundle_dir), needed_bytes, overwrite=overwrite, key=key) as bundle:
        check_files(_input_files(checkpoint), partial(report, "hashes"))
        bundle.add(contract.TOKENIZER_FILE, source.tokenizer)
        embedding = _write_embeddings(bundle, checkpoint, weights, report)
        vision, vision_writer = _write_vision(bundle, checkpoint, weights, block_size, native, report)
        decoder, decoder_writer = _write_decoder(bundle, checkpoint, precisions, embedding, native, report)
        report("parity", 0, 1)
        kv_dtypes = precisions.kv_dtypes if native else None
        written = Written(bundle.folder, checkpoint, weights, vision_writer, decoder_writer, embedding, kv_dtypes)
        parity = prove(written, source.probe, recorded)
        report("parity", 1, 1)
        if not allow_mismatch:
            require_parity(parity)
        manifest = Manifest(
            schema=contract.MANIFEST_SCHEMA,
            tool=_tool(),
            source=_provenance(checkpoint, [*source.notes, *vision_writer.notes, *decoder_writer.notes]),
            decoder_facts=checkpoint.facts.decoder,
            vision_facts=checkpoint.facts.vision,
            preprocess=source.preprocess,
            protocol=STREAMO,
            tokens=source.tokens,
            embedding=EmbeddingTable(embedding.file, *_two(embedding.shape), embedding.dtype),
            vision=vision,
            decoder=decoder,
            kv_dtypes=precisions.kv_dtypes,
            files=dict(sorted(bundle.files.items())),
            stream=source.stream.defaults,
            parity=parity,
            key_offset_layers=_key_offset_layers(decoder_writer),
        )
        bundle.publish(manifest)
    return manifest


def _check_arguments(weights: str, kv: str | None, block_size: int) -> None:
    if weights not in PRECISIONS:
        raise UsageError(f"Weights {weights!r}: expected one of {', '.join(PRECISIONS)}")
    if kv not in (None, *KV_DTYPES):
        raise UsageError(f"KV cache {kv!r}: expected one of {', '.join(KV_DTYPES)}")
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"Block size {block_size}: expected one of {', '.join(map(str, BLOCK_SIZES))}")


def preflight(
    checkpoint_dir: str | Path,
    bundle_dir: str | Path,
    *,
    weights: str = "fp32",
    block_size: int = 32,
    adapter: str | Path | None = None,
) -> Preflight:
    """What an export with these arguments will take. Opens and checks the checkpoint; writes nothing.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
    """
    source = _open(Path(checkpoint_dir), adapter)
    checkpoint = source.checkpoint
    free, left_behind = disk_free_bytes(Path(bundle_dir))
    return Preflight(
        bundle_bytes=bundle_bytes(checkpoint, weights, block_size),
        left_behind_bytes=left_behind,
        disk_free_bytes=free,
        memory_bytes=memory_bytes(checkpoint),
        parameters=checkpoint.parameters,
        layers=checkpoint.facts.decoder.layers,
        known_hashes=sum(known_hash(path) is not None for path in _input_files(checkpoint)),
        notes=tuple(source.notes),
    )


def _input_files(checkpoint: Checkpoint) -> list[Path]:
    names = ("config.json", contract.TOKENIZER_FILE, PREPROCESSOR_FILE)
    return [*checkpoint.files, *(checkpoint.folder_of(name) / name for name in names)]


def _key_offset_layers(writer: WeightWriter) -> tuple[int, ...]:
    layers = range(writer.checkpoint.facts.decoder.layers)
    return tuple(layer for layer in layers if key_offset_name(layer) in writer.stored)


def record_reference(checkpoint_dir: str | Path, path: str | Path, adapter: str | Path | None = None) -> None:
    """Write down what PyTorch computes for a checkpoint, so that it can be exported where there is no PyTorch.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
      UsageError: torch or transformers is not installed.
    """
    source = _open(Path(checkpoint_dir), adapter)
    save_expected(Path(path), compute_expected(source.checkpoint, source.probe), source.checkpoint, source.probe)


@dataclass(frozen=True)
class _Source:
    """A checkpoint with its small files read."""

    checkpoint: Checkpoint
    tokenizer: bytes
    tokens: TokenIds
    stream: StreamFile
    preprocess: PreprocessConfig
    notes: list[str]
    probe: Probe


def _open(folder: Path, adapter: str | Path | None) -> _Source:
    checkpoint = open_checkpoint(folder)
    merge_notes: list[str] = []
    if adapter is not None:
        checkpoint, merge_notes = with_adapter(checkpoint, open_adapter(Path(adapter)))
    tokenizer = read_tokenizer(checkpoint)
    stream = read_stream_file(checkpoint)
    rows = checkpoint.facts.decoder.vocab_size
    tokens = token_ids(tokenizer, STREAMO, rows, spelled_states=stream.spelled_states)
    preprocess, notes = read_preprocess(checkpoint)
    probe = build_probe(preprocess, tokens, tokenizer)
    return _Source(checkpoint, tokenizer, tokens, stream, preprocess, [*merge_notes, *notes], probe)


@dataclass(frozen=True)
class _Precisions:
    """What the decoder's numbers become."""

    weights: str
    block: int
    kv_dtypes: tuple[str, ...]


def _precisions(source: _Source, weights: str, kv: str | None, block: int) -> tuple[_Precisions, Operators | None]:
    """The decoder's precisions, and the operators of the native graphs; None where they do not cover the model."""
    facts = source.checkpoint.facts
    reason = unsupported(facts)
    if reason:
        source.notes.append(f"no native graphs: {reason}")
        if kv == "int8":
            raise UsageError(
                f"An int8 KV cache needs the native operators, which do not cover this model: {reason}",
                hint="Export with `--kv fp32`",
            )
    kv = kv or ("int8" if weights in QUANTIZED and not reason else "fp32")
    dtypes = (KV_DTYPES[kv],) * facts.decoder.layers
    return _Precisions(weights, block, dtypes), None if reason else NativeOperators.of(dtypes)


def _write_embeddings(bundle: BundleWriter, checkpoint: Checkpoint, weights: str, report: Progress) -> StoredTensor:
    report("embeddings", 0, 1)
    with bundle.weight_file(contract.EMBEDDING_FILE) as file:
        writer = WeightWriter(checkpoint, file)
        write_embeddings(writer, weights)
    bundle.record(contract.EMBEDDING_FILE, file.facts())
    report("embeddings", 1, 1)
    return writer.stored["embedding"]


def _write_vision(
    bundle: BundleWriter, checkpoint: Checkpoint, weights: str, block: int, native: Operators | None, report: Progress
) -> tuple[Component, WeightWriter]:
    with bundle.weight_file(VISION_DATA) as file:
        writer = WeightWriter(checkpoint, file, block)
        write_vision(writer, weights, _marking(file, partial(report, "vision")))
    bundle.record(VISION_DATA, file.facts())
    build = partial(build_vision, checkpoint.facts, writer.stored)
    builder = build()
    bundle.add(contract.VISION_FILE, builder.serialize("vision", PRODUCER))
    component = _component(contract.VISION_FILE, vision_precision(weights), builder)
    if native is None:
        return component, writer
    bundle.add(contract.NATIVE_VISION_FILE, build(operators=native).serialize("vision", PRODUCER))
    return replace(component, native_file=contract.NATIVE_VISION_FILE), writer


def _write_decoder(
    bundle: BundleWriter,
    checkpoint: Checkpoint,
    precisions: _Precisions,
    embedding: StoredTensor,
    native: Operators | None,
    report: Progress,
) -> tuple[Component, WeightWriter]:
    facts = checkpoint.facts.decoder
    with bundle.weight_file(DECODER_DATA) as file:
        writer = WeightWriter(checkpoint, file, precisions.block)
        step = _marking(file, partial(report, "decoder"))
        write_decoder(writer, precisions.weights, embedding, precisions.kv_dtypes, step)
    bundle.record(DECODER_DATA, file.facts())
    build = partial(build_decoder, facts, writer.stored)
    builder = build()
    bundle.add(contract.DECODER_FILE, builder.serialize("decoder", PRODUCER, [stream_attention_function(facts)]))
    component = _component(contract.DECODER_FILE, precisions.weights, builder)
    if native is None:
        return component, writer
    bundle.add(contract.NATIVE_DECODER_FILE, build(operators=native).serialize("decoder", PRODUCER))
    return replace(component, native_file=contract.NATIVE_DECODER_FILE), writer


def _marking(file: WeightFile, report: Step) -> Step:
    """`report`, and what is finished by then need not be done again after an interruption."""

    def step(done: int, total: int) -> None:
        file.mark()
        report(done, total)

    return step


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _component(file: str, weights: str, builder: GraphBuilder) -> Component:
    return Component(file, weights, builder.weight_bytes(), tuple(builder.inputs), tuple(builder.outputs))


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

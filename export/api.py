"""The whole way from a checkpoint folder to a bundle.

Owns the order of the steps. Each step is a module of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edge import contract
from edge.contract import Manifest
from edge.errors import UsageError
from edge.prompt import STREAMO
from export.bundle_writer import BundleWriter
from export.calibration_needs import calibration_needs
from export.checkpoint import Checkpoint
from export.components import add_decoder, add_embedding, add_vision
from export.converse import Spelling, converse
from export.expected import compute_expected, load_expected, save_expected
from export.kept_turns import KeptTurns
from export.known_hashes import check_files, known_hash
from export.layer_parity import ALL, layers_to_compare
from export.limits import held_out_limits
from export.manifest import build_manifest
from export.native import unsupported
from export.parity import require_parity
from export.partial import disk_free_bytes
from export.plan import AUTO, GPTQ, KV_DTYPES, NEAREST, Plan, make_plan
from export.preflight import Preflight, bundle_bytes, memory_bytes
from export.probe import probe_pictures
from export.proof import HeldOut, Written, prove
from export.reference import require_packages
from export.resume import resume_key
from export.source import Source, open_source
from export.stored_turns import TurnsRecorder
from export.stream_config import PREPROCESSOR_FILE
from export.turns import Clip, Conversation

Progress = Callable[[str, int, int], None]
"""Called as the export goes on: (stage, done, total). Stages: hashes (where some are known), embeddings, vision,
turns, decoder, parity."""


def export_checkpoint(
    checkpoint_dir: str | Path,
    bundle_dir: str | Path,
    *,
    weights: str = "fp32",
    kv: str | None = None,
    block_size: int = 32,
    method: str | None = None,
    vision: str | None = None,
    embedding: str | None = None,
    layers: Mapping[str, str] | None = None,
    clips: Sequence[Clip] | None = None,
    allow_mismatch: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    gate: Mapping[str, float] | None = None,
    parity_layers: str | int | None = None,
) -> Manifest:
    """Export a Qwen2.5-VL checkpoint with Streamo's state tokens as a bundle.

    Args:
      checkpoint_dir: a Hugging Face folder; only files directly in it are read.
      bundle_dir: the folder to create.
      weights: fp32, fp16, int8 or int4, of the decoder's linear maps.
      kv: auto, fp32 or int8, of the native decoder's KV cache; None: auto with weights of int8 or int4, else fp32. With
        auto each layer's is chosen by its keys and values on calibration turns; without any it is int8. The stock
        decoder's cache is always fp32.
      block_size: weights along K that share a scale in int8 and int4.
      method: nearest or gptq, how weights of int8 and int4 are rounded; None: gptq if there are turns to calibrate on.
      vision: fp32, fp16 or int8, of the vision tower; None: int8 with weights of int8 or int4, else as `weights`.
      embedding: the same for the embedding table.
      layers: precisions of single weights by name: layers.3.down, layers.3 or head.
      clips: real turns. What is held out of a clip (`Clip.held_out`), the bundle has to answer as the checkpoint does;
        on the rest weights are calibrated, and KV caches measured. Without clips nothing but a probe of three turns is
        compared.
      allow_mismatch: write the bundle even if it does not compute what PyTorch computes.
      progress: called as (stage, done, total).
      overwrite: replace an existing bundle.
      reference: a record by `record_reference`, to compare with instead of PyTorch on the spot; with it neither torch
        nor transformers is needed.
      adapter: a LoRA adapter's folder in PEFT's layout, merged into the checkpoint tensor by tensor.
      gate: limits of how it answers held-out turns, tighter than the defaults; see `limits.FIGURES`.
      parity_layers: `all`, or how many decoder layers are compared with PyTorch, each given PyTorch's own hidden
        states; held-out turns are then compared in these layers, and not answered. None: all, or 8 of a model with
        more than 12 billion parameters; all with `reference`.

    Returns:
      The manifest that was written.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
      ParityError: the graphs differ from PyTorch by more than the precision explains; nothing is left behind.
      OutputError: the bundle cannot be written.
      UsageError: an argument is not usable.
    """
    report = progress or (lambda stage, done, total: None)
    source = open_source(Path(checkpoint_dir), adapter)
    checkpoint = source.checkpoint
    choices: dict[str, Any] = {"block": block_size, "vision": vision, "embedding": embedding, "layers": layers}
    plan = make_plan(weights, method=_method(method, clips), facts=checkpoint.facts.decoder, **choices)
    kv_wanted, native = _cache(source, plan, kv)
    recorded = load_expected(Path(reference), checkpoint, source.probe) if reference else None
    if recorded is None:
        require_packages()
    compared = _compared_layers(checkpoint, parity_layers, recorded=recorded is not None, gate=gate)
    held_out_limits(plan.coarsest, (KV_DTYPES.get(kv_wanted, "int8"),), gate or {})  # before the work
    options = {"plan": asdict(plan), "kv": kv_wanted, "clips": _digest(c for c in clips or () if not c.held_out)}
    key = resume_key(checkpoint, {contract.TOKENIZER_FILE: source.tokenizer}, options)
    turns = calibration_needs(checkpoint, plan, source.preprocess, clips or [])
    needed_bytes = bundle_bytes(checkpoint, plan) + turns.kept_bytes
    with BundleWriter(Path(bundle_dir), needed_bytes, overwrite=overwrite, key=key) as bundle:
        check_files(_input_files(checkpoint), partial(report, "hashes"))
        bundle.add(contract.TOKENIZER_FILE, source.tokenizer)
        table = add_embedding(bundle, checkpoint, plan, partial(report, "embeddings"))
        tower, vision_writer = add_vision(bundle, checkpoint, plan, native, partial(report, "vision"))
        talks = _converse(source, clips or [], report, KeptTurns(bundle.kept))
        made = add_decoder(bundle, checkpoint, plan, table, native, kv_wanted, talks, partial(report, "decoder"))
        kv_dtypes = made.kv_dtypes if native else None
        written = Written(bundle.folder, checkpoint, plan.coarsest, vision_writer, made.writer, table, kv_dtypes)
        held_out = HeldOut(talks, source.tokens, STREAMO.turn_interval_s, gate or {})
        recorder = TurnsRecorder(written, source.probe, probe_pictures(source.preprocess))
        parity = prove(written, source.probe, recorded, held_out, partial(report, "parity"), compared, recorder)
        if not allow_mismatch:
            require_parity(parity)
        bundle.add(contract.TURNS_FILE, recorder.content)
        manifest = build_manifest(source, bundle.files, table, (tower, vision_writer), made, parity)
        bundle.publish(manifest)
    return manifest


def _method(wanted: str | None, clips: Sequence[Clip] | None) -> str:
    """How weights are rounded.

    Raises:
      UsageError: by turns, of which there are none.
    """
    calibrating = any(not clip.held_out for clip in clips or ())
    if wanted == GPTQ and not calibrating:
        raise UsageError(f"Method {GPTQ} needs turns to calibrate on", hint="Give clips, or choose `nearest`")
    return wanted or (GPTQ if calibrating else NEAREST)


def _compared_layers(
    checkpoint: Checkpoint, wanted: str | int | None, *, recorded: bool, gate: Mapping[str, float] | None
) -> list[int] | None:
    """The layers that are compared one by one; None: all, in the whole graphs.

    Raises:
      UsageError: single layers are asked for together with what they cannot be compared with, or by.
    """
    layers = layers_to_compare(checkpoint, ALL if recorded and wanted is None else wanted)
    if recorded and layers:
        raise UsageError("A recorded reference has no hidden states of single layers", hint="Compare all layers")
    if gate and layers:
        raise UsageError(
            f"The gate's limits are for answers on held-out turns, which {len(layers)} of the layers do not give",
            hint="Leave the limits out, or compare all layers with `--parity-layers all`",
        )
    return layers


def preflight(
    checkpoint_dir: str | Path,
    bundle_dir: str | Path,
    *,
    weights: str = "fp32",
    block_size: int = 32,
    vision: str | None = None,
    embedding: str | None = None,
    layers: Mapping[str, str] | None = None,
    adapter: str | Path | None = None,
    method: str | None = None,
    clips: Sequence[Clip] | None = None,
) -> Preflight:
    """What an export with these arguments will take. Opens and checks the checkpoint; writes nothing.

    Args:
      clips: what is to be calibrated on: its memory counts too.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
    """
    source = open_source(Path(checkpoint_dir), adapter)
    checkpoint = source.checkpoint
    choices: dict[str, Any] = {"block": block_size, "vision": vision, "embedding": embedding, "layers": layers}
    plan = make_plan(weights, method=_method(method, clips), facts=checkpoint.facts.decoder, **choices)
    turns = calibration_needs(checkpoint, plan, source.preprocess, clips or [])
    free, left_behind = disk_free_bytes(Path(bundle_dir))
    return Preflight(
        bundle_bytes=bundle_bytes(checkpoint, plan),
        kept_bytes=turns.kept_bytes,
        left_behind_bytes=left_behind,
        disk_free_bytes=free,
        memory_bytes=memory_bytes(checkpoint, turns),
        parameters=checkpoint.parameters,
        layers=checkpoint.facts.decoder.layers,
        known_hashes=sum(known_hash(path) is not None for path in _input_files(checkpoint)),
        calibration_clips=turns.clips,
        calibration_turns=turns.turns,
        calibration_tokens=turns.tokens,
        notes=tuple(source.notes),
    )


def _input_files(checkpoint: Checkpoint) -> list[Path]:
    names = ("config.json", contract.TOKENIZER_FILE, PREPROCESSOR_FILE)
    return [*checkpoint.files, *(checkpoint.folder_of(name) / name for name in names)]


def record_reference(checkpoint_dir: str | Path, path: str | Path, adapter: str | Path | None = None) -> None:
    """Write down what PyTorch computes for a checkpoint, so that it can be exported where there is no PyTorch.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
      UsageError: torch or transformers is not installed.
    """
    source = open_source(Path(checkpoint_dir), adapter)
    save_expected(Path(path), compute_expected(source.checkpoint, source.probe), source.checkpoint, source.probe)


def _cache(source: Source, plan: Plan, kv: str | None) -> tuple[str, bool]:
    """What the KV cache is wanted to be, and whether there are native graphs: their operators may not cover the model.

    Raises:
      UsageError: an int8 cache without them.
    """
    if kv not in (None, AUTO, *KV_DTYPES):
        raise UsageError(f"KV cache {kv!r}: expected one of {', '.join([AUTO, *KV_DTYPES])}")
    reason = unsupported(source.checkpoint.facts)
    if not reason:
        return kv or (AUTO if plan.quantized else "fp32"), True
    source.notes.append(f"no native graphs: {reason}")
    if kv == "int8":
        raise UsageError(
            f"An int8 KV cache needs the native operators, which do not cover this model: {reason}",
            hint="Export with `--kv fp32`",
        )
    return "fp32", False


def _digest(clips: Iterable[Clip]) -> str:
    """Of everything in clips that a bundle depends on."""
    digest = hashlib.sha256()
    for clip in clips:
        facts = [clip.name, sorted(clip.questions.items()), clip.held_out, [frame.shape for frame in clip.frames]]
        digest.update(repr(facts).encode())
        for frame in clip.frames:
            digest.update(frame.tobytes())
    return digest.hexdigest()


def conversations(checkpoint_dir: str | Path, clips: Sequence[Clip]) -> list[Conversation]:
    """What a checkpoint says about clips when nothing is quantised.

    Raises:
      CheckpointError: the checkpoint cannot be exported.
    """
    return _converse(open_source(Path(checkpoint_dir)), clips, lambda stage, done, total: None)


def _converse(
    source: Source, clips: Sequence[Clip], report: Progress, kept: KeptTurns | None = None
) -> list[Conversation]:
    """What the unquantised model says about the clips."""
    if not clips:
        return []
    report("turns", 0, sum(len(clip.frames) for clip in clips))
    spelling = Spelling(source.tokens, source.tokenizer, source.preprocess)
    return converse(source.checkpoint, spelling, clips, partial(report, "turns"), kept)

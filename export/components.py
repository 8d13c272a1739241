"""A bundle's three components on disk: their weights, and the graphs over them for each kind of operators.

Owns which files a component has, and what the manifest says about each. Which weights a graph needs is `weights`'s, how
they are rounded `plan`'s and `calibrate`'s; the graphs are built by `vision` and `decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from edge import contract
from edge.contract import Component, LayerCache, WeightPrecision
from export.bundle_writer import BundleWriter
from export.calibrate import Calibrated, CalibrationTurns, write_calibrated_decoder
from export.checkpoint import Checkpoint
from export.decoder import build_decoder
from export.float_model import FloatModel
from export.native import NativeOperators
from export.onnx_writer import GraphBuilder
from export.plan import AUTO, KV_DTYPES, Plan
from export.stream_attention import stream_attention_function
from export.tensorrt import TensorRTOperators, any_half_scales, write_half_scales
from export.turns import Conversation, describe_turns
from export.vision import build_vision
from export.weight_store import StoredTensor, WeightFile
from export.weight_writer import Step, WeightWriter
from export.weights import write_decoder, write_embeddings, write_vision

VISION_DATA = "vision.data"
DECODER_DATA = "decoder.data"
PRODUCER = "streamo-edge"


def add_embedding(bundle: BundleWriter, checkpoint: Checkpoint, plan: Plan, step: Step) -> dict[str, StoredTensor]:
    """The embedding table, by the names of `weights`."""
    step(0, 1)
    with bundle.weight_file(contract.EMBEDDING_FILE) as file:
        writer = WeightWriter(checkpoint, file)
        write_embeddings(writer, plan.embedding)
    bundle.record(contract.EMBEDDING_FILE, file.facts())
    step(1, 1)
    return writer.stored


def add_vision(
    bundle: BundleWriter, checkpoint: Checkpoint, plan: Plan, native: bool, step: Step
) -> tuple[Component, WeightWriter]:
    """The vision tower: its weights, the stock graph, and where `native` the graphs with our operators."""
    with bundle.weight_file(VISION_DATA) as file:
        writer = WeightWriter(checkpoint, file, plan.block)
        write_vision(writer, plan.vision, _marking(file, step))
    bundle.record(VISION_DATA, file.facts())
    build = partial(build_vision, checkpoint.facts, writer.stored)
    builder = build()
    bundle.add(contract.VISION_FILE, builder.serialize("vision", PRODUCER))
    component = _component(contract.VISION_FILE, plan.vision, builder)
    if not native:
        return component, writer
    bundle.add(contract.NATIVE_VISION_FILE, build(operators=NativeOperators).serialize("vision", PRODUCER))
    bundle.add(contract.TENSORRT_VISION_FILE, build(operators=TensorRTOperators).serialize("vision", PRODUCER))
    own = replace(component, native_file=contract.NATIVE_VISION_FILE, tensorrt_file=contract.TENSORRT_VISION_FILE)
    return own, writer


@dataclass(frozen=True)
class WrittenDecoder:
    """A decoder that was written, and what was found out on the way.

    Attributes:
      kv_dtypes: of each layer's cache in the native graph, if there is one.
      kv_layers: what calibration measured of them; empty without.
    """

    component: Component
    writer: WeightWriter
    kv_dtypes: tuple[str, ...]
    kv_layers: list[LayerCache]
    precision: WeightPrecision


def add_decoder(
    bundle: BundleWriter,
    checkpoint: Checkpoint,
    plan: Plan,
    table: Mapping[str, StoredTensor],
    native: bool,
    kv: str,
    talks: Sequence[Conversation],
    step: Step,
) -> WrittenDecoder:
    """The decoder: its weights, fitted to `talks` if any is to be calibrated on, and its graphs as of `add_vision`.

    Args:
      table: the embedding table, which a tied head may refer to.
      kv: auto, fp32 or int8; auto without calibration is int8.
    """
    facts, found = checkpoint.facts.decoder, Calibrated()
    calibrating = any(talk.calibration_tokens for talk in talks)
    dtypes = (KV_DTYPES["int8" if kv == AUTO else kv],) * facts.layers
    with bundle.weight_file(DECODER_DATA) as file:
        writer = WeightWriter(checkpoint, file, plan.block)
        step = _marking(file, step)
        if calibrating:
            turns = CalibrationTurns.of(writer, talks, FloatModel(checkpoint).embeddings)
            found = write_calibrated_decoder(writer, plan, table["embedding"], turns, kv, step, bundle.kept)
            dtypes = tuple(layer.dtype for layer in found.kv_layers)
            plan = plan.replaced(*found.overrides)
        else:
            write_decoder(writer, plan, table["embedding"], dtypes, step)
    bundle.record(DECODER_DATA, file.facts())
    build = partial(build_decoder, facts, writer.stored)
    builder = build()
    bundle.add(contract.DECODER_FILE, builder.serialize("decoder", PRODUCER, [stream_attention_function(facts)]))
    component = _component(contract.DECODER_FILE, plan.weights, builder)
    if native:
        graph = build(operators=NativeOperators.of(dtypes)).serialize("decoder", PRODUCER)
        bundle.add(contract.NATIVE_DECODER_FILE, graph)
        _write_tensorrt_decoder(bundle, writer, facts, dtypes)
        component = replace(
            component, native_file=contract.NATIVE_DECODER_FILE, tensorrt_file=contract.TENSORRT_DECODER_FILE
        )
    precision = WeightPrecision(
        method=plan.method if plan.quantized else "",
        block_size=plan.block if plan.rounded else 0,
        head=plan.head,
        overrides=tuple(plan.overrides[name] for name in sorted(plan.overrides)),
        output_errors=found.output_errors,
        calibration=describe_turns(talks) if calibrating else {},
    )
    return WrittenDecoder(component, writer, dtypes, found.kv_layers, precision)


def _write_tensorrt_decoder(
    bundle: BundleWriter, writer: WeightWriter, facts: contract.DecoderFacts, kv_dtypes: tuple[str, ...]
) -> None:
    """The decoder graph for TensorRT, and the scales that only it reads, if it reads any."""
    if any_half_scales(writer.stored):
        with bundle.weight_file(contract.TENSORRT_DATA_FILE) as file:
            writer.stored.update(write_half_scales(bundle.folder, writer.stored, file))
        bundle.record(contract.TENSORRT_DATA_FILE, file.facts())
    graph = build_decoder(facts, writer.stored, operators=TensorRTOperators.of(kv_dtypes))
    bundle.add(contract.TENSORRT_DECODER_FILE, graph.serialize("decoder", PRODUCER))


def _marking(file: WeightFile, report: Step) -> Step:
    """`report`, and what is finished by then need not be done again after an interruption."""

    def step(done: int, total: int) -> None:
        file.mark()
        report(done, total)

    return step


def _component(file: str, weights: str, builder: GraphBuilder) -> Component:
    return Component(file, weights, builder.weight_bytes(), tuple(builder.inputs), tuple(builder.outputs))

"""Whole bundles of random weights: they open, load and run as a trained model's would, and say nothing sensible.

Owns what can be chosen, what such a bundle takes on disk, and its place in a folder. The weights come from
`random_model`, the graphs from `export`'s own builders, the tokenizer from the shipped model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.bench import random_model
from apps.bench.random_model import SHAPES, RandomWeights
from apps.demo import CHECKPOINT
from edge import contract
from edge.bundle import open_bundle
from edge.contract import Component, Manifest
from edge.errors import BundleError
from edge.preprocess import PreprocessConfig
from edge.prompt import STREAMO
from export.checkpoint import Checkpoint
from export.config import ModelFacts
from export.plan import KV_DTYPES, PRECISIONS, Plan, make_plan, value_bytes
from export.safetensors_file import TensorEntry
from export.tensor_names import expected_shapes

if TYPE_CHECKING:
    from export.bundle_writer import BundleWriter
    from export.weight_store import StoredTensor

PRODUCER = "streamo-edge bench"

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Recipe:
    """What decides a random bundle.

    Args:
      shape: of SHAPES.
      weights: fp32, fp16, int8 or int4, of the decoder's linear maps.
      kv: fp32 or int8.
      block: rows along K that share a scale in quantised weights.
      layers: of the decoder; None for all of the shape.
    """

    shape: str
    weights: str = "int4"
    kv: str = "int8"
    block: int = 32
    layers: int | None = None

    @property
    def facts(self) -> ModelFacts:
        facts = SHAPES[self.shape]
        return facts if self.layers is None else replace(facts, decoder=replace(facts.decoder, layers=self.layers))

    @property
    def plan(self) -> Plan:
        """Of every weight, as `export` chooses it beside these weights."""
        return make_plan(self.weights, block=self.block, facts=self.facts.decoder)

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        return (KV_DTYPES[self.kv],) * self.facts.decoder.layers

    @property
    def name(self) -> str:
        """Of its folder."""
        layers = "" if self.layers is None else f"-{self.layers}-layers"
        return f"random-{self.shape}{layers}-{self.weights}-{self.block}-kv-{self.kv}"

    @property
    def embedding_bytes(self) -> int:
        """Of the table of token embeddings."""
        from export.weight_writer import EMBEDDING_BLOCK

        facts = self.facts.decoder
        return int(facts.vocab_size * facts.hidden_size * value_bytes(self.plan.embedding, EMBEDDING_BLOCK))

    @property
    def bytes(self) -> int:
        """About what the bundle takes on disk."""
        from export.preflight import bundle_bytes

        shapes = expected_shapes(self.facts).items()
        entries = {name: TensorEntry(Path(), name, "BF16", shape, 0) for name, shape in shapes}
        return bundle_bytes(Checkpoint(Path(), {}, "", self.facts, entries), self.plan)


def find(recipe: Recipe, folder: Path) -> Path | None:
    """The bundle in `folder`, if it is there, whole, and made by this version of the code."""
    path = folder / recipe.name
    try:
        manifest = open_bundle(path, verify=False).manifest
    except BundleError:
        return None
    return path if manifest.source == _source(recipe) else None


def make(recipe: Recipe, folder: Path, progress: Progress) -> Path:
    """Write the bundle into `folder`; it appears whole or not at all, and replaces an older one of the same recipe.

    Raises:
      OutputError: the folder cannot be written, or the disk is too full.
      ModuleNotFoundError: a package that export needs is not installed.
    """
    from export.bundle_writer import BundleWriter
    from export.decoder import build_decoder
    from export.stock import StockOperators
    from export.tokens import token_ids
    from export.vision import build_vision
    from export.weights import embedding_table

    target = folder / recipe.name
    tokenizer = (CHECKPOINT / contract.TOKENIZER_FILE).read_bytes()
    facts, plan, kv = recipe.facts, recipe.plan, recipe.kv_dtypes
    vocab_size, width = facts.decoder.vocab_size, facts.decoder.hidden_size
    with BundleWriter(target, recipe.bytes, overwrite=True) as bundle:
        write = partial(_write, bundle, plan.block)
        progress("embeddings", 0, 3)
        bundle.add(contract.TOKENIZER_FILE, tokenizer)
        shape, dtype = (vocab_size, width), PRECISIONS[plan.embedding]
        table = write(contract.EMBEDDING_FILE, 20, lambda weights: weights.table("embedding", shape, dtype, 1.0))
        progress("vision tower", 1, 3)
        stored = write("vision.data", 22, lambda weights: random_model.add_vision(weights, facts, plan))
        vision = _add_graphs(bundle, "vision", plan.vision, kv, partial(build_vision, facts, stored))
        progress("decoder", 2, 3)
        add = random_model.add_decoder
        stored = write("decoder.data", 21, lambda weights: add(weights, facts.decoder, plan, kv[0], table["embedding"]))
        build, functions = partial(build_decoder, facts.decoder, stored), StockOperators.functions(facts.decoder)
        decoder = _add_graphs(bundle, "decoder", plan.weights, kv, build, functions)
        bundle.publish(
            Manifest(
                schema=contract.MANIFEST_SCHEMA,
                tool=PRODUCER,
                source=_source(recipe),
                decoder_facts=facts.decoder,
                vision_facts=facts.vision,
                preprocess=PreprocessConfig(patch_size=facts.patch_size, merge_size=facts.merge_size),
                protocol=STREAMO,
                tokens=token_ids(tokenizer, STREAMO, vocab_size),
                embedding=embedding_table(table),
                vision=vision,
                decoder=decoder,
                kv_dtypes=kv,
                files=dict(sorted(bundle.files.items())),
                key_offset_layers=tuple(range(len(kv))) if recipe.kv == "int8" else (),
            )
        )
        progress("decoder", 3, 3)
    return target


def _source(recipe: Recipe) -> dict[str, Any]:
    from export.fingerprint import code_fingerprint

    code = code_fingerprint(Path(__file__), Path(str(random_model.__file__)))
    return {"name": f"random weights of the shape {recipe.shape}", "recipe": recipe.name, "code": code}


def _write(
    bundle: BundleWriter, block: int, name: str, seed: int, fill: Callable[[RandomWeights], None]
) -> Mapping[str, StoredTensor]:
    """A data file. It is in no journal: an interrupted build is not gone on with."""
    from export.weight_store import WeightFile

    with WeightFile(bundle.folder / name) as file:
        weights = RandomWeights(file, seed, block)
        fill(weights)
    bundle.record(name, file.facts())
    return weights.stored


def _add_graphs(
    bundle: BundleWriter,
    part: str,
    weights: str,
    kv_dtypes: tuple[str, ...],
    build: Callable[..., Any],
    functions: Sequence[Any] = (),
) -> Component:
    """The stock and the native graph of one part."""
    from export.native import NativeOperators

    stock, native = build(), build(operators=NativeOperators.of(kv_dtypes))
    file, native_file = f"{part}.onnx", f"{part}.native.onnx"
    bundle.add(file, stock.serialize(part, PRODUCER, functions))
    bundle.add(native_file, native.serialize(part, PRODUCER))
    return Component(file, weights, stock.weight_bytes(), tuple(stock.inputs), tuple(stock.outputs), native_file)

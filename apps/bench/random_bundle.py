"""Whole bundles of random weights: they open, load and run as a trained model's would, and say nothing sensible.

Owns the shapes that can be chosen, what such a bundle takes on disk and in memory, and its place in a folder. The
weights come from `random_model`, the graphs from `export`'s own builders, the tokenizer from the shipped model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from apps.bench import random_model
from apps.bench.random_model import DECODERS, TOWERS, RandomWeights
from edge import contract
from edge.bundle import open_bundle
from edge.contract import Component, DecoderFacts, EmbeddingTable, Manifest, VisionFacts
from edge.errors import BundleError
from edge.preprocess import PreprocessConfig
from edge.prompt import STREAMO

SHAPES: dict[str, tuple[DecoderFacts, VisionFacts]] = {
    "qwen2.5-vl-3b": (DECODERS["3B"], TOWERS["3B"]),
    "qwen2.5-vl-7b": (DECODERS["7B"], TOWERS["7B"]),
    "demo": (
        DecoderFacts(6, 256, 768, 4, 2, 64, 832, 1e-6, 1e4, (8, 12, 12), True),
        VisionFacts(4, 128, 384, 4, 256, 56, (1, 3)),
    ),
}
DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
KV_DTYPES = {"fp32": "float32", "int8": "int8"}
PRODUCER = "streamo-edge bench"
DECODER_DATA, VISION_DATA = "decoder.data", "vision.data"

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
    def decoder(self) -> DecoderFacts:
        facts = SHAPES[self.shape][0]
        return facts if self.layers is None else replace(facts, layers=self.layers)

    @property
    def vision(self) -> VisionFacts:
        return SHAPES[self.shape][1]

    @property
    def vision_weights(self) -> str:
        """Of the vision tower, as `export` chooses it beside these weights."""
        return "int8" if self.weights in ("int8", "int4") else self.weights

    @property
    def name(self) -> str:
        """Of its folder."""
        layers = "" if self.layers is None else f"-{self.layers}-layers"
        return f"random-{self.shape}{layers}-{self.weights}-{self.block}-kv-{self.kv}"

    @property
    def embedding_bytes(self) -> int:
        """Of the table of token embeddings."""
        return self.decoder.vocab_size * self.decoder.hidden_size * (4 if self.weights == "fp32" else 2)

    @property
    def bytes(self) -> int:
        """What the bundle takes on disk, nearly: biases and the graphs themselves are left out."""
        from export.quantize import padded_width

        facts, table = self.decoder, self.decoder.vocab_size * self.decoder.hidden_size
        width, inner, heads = facts.hidden_size, facts.intermediate_size, facts.num_heads + 2 * facts.num_kv_heads
        layer = width * (heads * facts.head_dim + facts.num_heads * facts.head_dim + 3 * inner)
        decoder = facts.layers * layer * self._value_bytes(self.weights, self.block)
        if self.vision_weights == "int8":
            decoder += table * self._value_bytes("int8", random_model.HEAD_BLOCK)
        elif not facts.tied_embeddings:
            decoder += self.embedding_bytes
        tower, merged = self.vision, self.vision.hidden_size * random_model.MERGE**2
        inner_width = tower.intermediate_size
        if self.vision_weights == "int8":
            inner_width = padded_width(inner_width, random_model.VISION_BLOCK)
        block = tower.hidden_size * (4 * tower.hidden_size + 3 * inner_width)
        vision = tower.depth * block + merged * (merged + tower.out_hidden_size)
        vision_bytes = vision * self._value_bytes(self.vision_weights, random_model.VISION_BLOCK)
        return int(decoder + vision_bytes + self.embedding_bytes)

    @staticmethod
    def _value_bytes(weights: str, block: int) -> float:
        return {"fp32": 4, "fp16": 2, "int8": 1 + 4 / block, "int4": 0.5 + 4 / block}[weights]


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
    from export.tokens import token_ids

    target = folder / recipe.name
    tokenizer = _tokenizer()
    facts = recipe.decoder
    with BundleWriter(target, recipe.bytes, overwrite=True) as bundle:
        progress("embeddings", 0, 3)
        bundle.add(contract.TOKENIZER_FILE, tokenizer)
        embedding = _write_embeddings(bundle, recipe)
        progress("vision tower", 1, 3)
        vision = _write_vision(bundle, recipe)
        progress("decoder", 2, 3)
        decoder = _write_decoder(bundle, recipe, embedding)
        bundle.publish(
            Manifest(
                schema=contract.MANIFEST_SCHEMA,
                tool=PRODUCER,
                source=_source(recipe),
                decoder_facts=facts,
                vision_facts=recipe.vision,
                preprocess=PreprocessConfig(patch_size=random_model.PATCH, merge_size=random_model.MERGE),
                protocol=STREAMO,
                tokens=token_ids(tokenizer, STREAMO, facts.vocab_size),
                embedding=EmbeddingTable(embedding.file, facts.vocab_size, facts.hidden_size, embedding.dtype),
                vision=vision,
                decoder=decoder,
                kv_dtypes=(KV_DTYPES[recipe.kv],) * facts.layers,
                files=dict(sorted(bundle.files.items())),
                key_offset_layers=tuple(range(facts.layers)) if recipe.kv == "int8" else (),
            )
        )
        progress("decoder", 3, 3)
    return target


def _source(recipe: Recipe) -> dict[str, Any]:
    from export.fingerprint import code_fingerprint

    code = code_fingerprint(Path(__file__), Path(str(random_model.__file__)))
    return {"name": f"random weights of the shape {recipe.shape}", "recipe": recipe.name, "code": code}


def _tokenizer() -> bytes:
    from apps.demo.bundle import CHECKPOINT

    return (CHECKPOINT / contract.TOKENIZER_FILE).read_bytes()


def _write_embeddings(bundle: Any, recipe: Recipe) -> Any:
    from export.weight_store import WeightFile

    facts = recipe.decoder
    with WeightFile(bundle.folder / contract.EMBEDDING_FILE) as file:
        shape, dtype = (facts.vocab_size, facts.hidden_size), "float32" if recipe.weights == "fp32" else "float16"
        stored = RandomWeights(file, seed=20).table(shape, dtype, 1.0)
    bundle.record(contract.EMBEDDING_FILE, file.facts())
    return stored


def _write_vision(bundle: Any, recipe: Recipe) -> Component:
    from export.vision import build_vision
    from export.weight_store import WeightFile

    facts = random_model.model_facts(recipe.decoder, recipe.vision)
    with WeightFile(bundle.folder / VISION_DATA) as file:
        weights = RandomWeights(file, seed=22)
        random_model.add_vision(weights, facts, DTYPES[recipe.vision_weights])
    bundle.record(VISION_DATA, file.facts())
    build = partial(build_vision, facts, weights.stored)
    return _add_graphs(bundle, recipe, "vision", build, recipe.vision_weights)


def _write_decoder(bundle: Any, recipe: Recipe, embedding: Any) -> Component:
    from export.decoder import build_decoder
    from export.weight_store import WeightFile

    with WeightFile(bundle.folder / DECODER_DATA) as file:
        weights = RandomWeights(file, seed=21)
        kv, dtype = KV_DTYPES[recipe.kv], DTYPES[recipe.weights]
        random_model.add_decoder(weights, recipe.decoder, dtype, recipe.block, kv, embedding)
    bundle.record(DECODER_DATA, file.facts())
    build = partial(build_decoder, recipe.decoder, weights.stored)
    return _add_graphs(bundle, recipe, "decoder", build, recipe.weights)


def _add_graphs(bundle: Any, recipe: Recipe, part: str, build: Callable[..., Any], weights: str) -> Component:
    """The stock and the native graph of one part."""
    from export.native import NativeOperators
    from export.stock import StockOperators

    native = NativeOperators.of((KV_DTYPES[recipe.kv],) * recipe.decoder.layers)
    stock = build()
    functions = StockOperators.functions(recipe.decoder) if part == "decoder" else []
    file, native_file = f"{part}.onnx", f"{part}.native.onnx"
    bundle.add(file, stock.serialize(part, PRODUCER, functions))
    bundle.add(native_file, build(operators=native).serialize(part, PRODUCER))
    return Component(file, weights, stock.weight_bytes(), tuple(stock.inputs), tuple(stock.outputs), native_file)

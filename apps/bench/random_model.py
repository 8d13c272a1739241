"""Graphs of a full-size model with random weights, to time it without its checkpoint.

Owns shapes, random weights and the files. The graphs come from `export`'s own builders, over weights laid out as a
bundle has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge import contract
from edge.contract import DecoderFacts, VisionFacts
from edge.errors import UsageError

BASE = "3B"
DECODERS = {
    "3B": DecoderFacts(36, 2048, 11008, 16, 2, 128, 151936, 1e-6, 1e6, (16, 24, 24), True),
    "7B": DecoderFacts(28, 3584, 18944, 28, 4, 128, 152064, 1e-6, 1e6, (16, 24, 24), False),
}
TOWERS = {
    "3B": VisionFacts(32, 1280, 3420, 16, 2048, 112, (7, 15, 23, 31)),
    "7B": VisionFacts(32, 1280, 3420, 16, 3584, 112, (7, 15, 23, 31)),
}
PATCH, MERGE = 14, 2
HEAD_BLOCK = 32
VISION_BLOCK = 32
LOUD_PAIRS = 4
PIECE_VALUES = 4 << 20
STEADY_GAIN = 0.2
"""How much a random layer adds to its input, so that numbers stay finite through all of them."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the four graphs lie."""

    folder: Path

    def graph(self, part: str, kind: str) -> Path:
        """`part` is `decoder` or `vision`, `kind` is `ours` or `stock`."""
        names = {
            ("decoder", "ours"): contract.NATIVE_DECODER_FILE,
            ("decoder", "stock"): contract.DECODER_FILE,
            ("vision", "ours"): contract.NATIVE_VISION_FILE,
            ("vision", "stock"): contract.VISION_FILE,
        }
        return self.folder / names[part, kind]


class RandomWeights:
    """Writes random weights to one file and remembers where they lie, as `export.weights` does with real ones."""

    def __init__(self, file: Any, seed: int) -> None:
        self._file, self._random = file, np.random.default_rng(seed)
        self.stored: dict[str, Any] = {}

    def vector(self, name: str, count: int, *, around: float = 0.0) -> None:
        """A norm's weight or a bias."""
        values = around + 0.05 * self._random.standard_normal(count, np.float32)
        self.stored[name] = self._file.append("float32", (count,), [values.astype(np.float32)])

    def key_offset(self, name: str, heads: int, width: int) -> None:
        """(Hkv, D) with a bias in a few channel pairs of each head, as Qwen2.5 has it."""
        values = np.zeros((heads, width), np.float32)
        for row in values:
            row[self._random.permutation(width // 2)[:LOUD_PAIRS]] = 100.0
        self.stored[name] = self._file.append("float32", values.shape, [values])

    def matrix(self, name: str, inputs: int, outputs: int, dtype: str, block: int) -> None:
        """Quantised codes (K, N) and their scales; float32 and float16 weights have none."""
        if dtype in ("float32", "float16"):
            self.stored[f"{name}.weight"] = self.table((inputs, outputs), dtype, inputs**-0.5)
            return
        code_bytes = inputs * outputs // (2 if dtype == "int4" else 1)
        self.stored[f"{name}.weight"] = self._file.append(dtype, (inputs, outputs), self._bytes(code_bytes))
        largest = 8 if dtype == "int4" else 127
        scale = STEADY_GAIN * 3**0.5 / largest / inputs**0.5
        scales = self._random.random((-(-inputs // block), outputs), np.float32) * np.float32(scale) + np.float32(scale)
        self.stored[f"{name}.scale"] = self._file.append("float32", scales.shape, [scales])

    def table(self, shape: tuple[int, int], dtype: str, spread: float) -> Any:
        """Normal numbers around 0, with nothing beside them."""
        rows = max(1, PIECE_VALUES // shape[1])
        counts = (min(rows, shape[0] - first) for first in range(0, shape[0], rows))
        pieces = (self._random.standard_normal((count, shape[1]), np.float32) * np.float32(spread) for count in counts)
        return self._file.append(dtype, shape, (piece.astype(dtype) for piece in pieces))

    def _bytes(self, count: int) -> Iterator[np.ndarray]:
        while count:
            piece = min(count, 64 << 20)
            yield np.frombuffer(self._random.bytes(piece), np.uint8)
            count -= piece


def make(
    folder: Path, *, size: str = BASE, layers: int | None = None, block: int = 128, kv: str = "int8"
) -> ModelFiles:
    """Write the graphs, unless they are there already from the same arguments.

    Args:
      layers: of the decoder; None for all. kv: the native graph's cache, int8 or float32.

    Raises:
      UsageError: a package that export needs is missing.
    """
    facts = decoder_facts(size, layers)
    wanted = {"decoder": asdict(facts), "vision": asdict(TOWERS[size]), "block": block, "kv": kv, "files": 4}
    mark = folder / "random_model.json"
    text = json.dumps(wanted, sort_keys=True)
    if mark.exists() and mark.read_text(encoding="utf-8") == text:
        return ModelFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    try:
        _write_decoder(folder, facts, block, kv)
        _write_vision(folder, size)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Whole models are written by the export stage, which needs the package `{error.name}`; it is missing",
            hint="pip install 'streamo-edge[demo]', or leave them out with `--only attention,matmul`",
        ) from None
    mark.write_text(text, encoding="utf-8")
    return ModelFiles(folder)


def decoder_facts(size: str, layers: int | None) -> DecoderFacts:
    """The decoder of one size, with all its layers or only the first ones."""
    return DECODERS[size] if layers is None else replace(DECODERS[size], layers=layers)


def _write_decoder(folder: Path, facts: DecoderFacts, block: int, kv: str) -> None:
    from export.decoder import build_decoder
    from export.native import NativeOperators
    from export.stock import StockOperators
    from export.weight_store import WeightFile

    with WeightFile(folder / "decoder.onnx.data") as file:
        weights = RandomWeights(file, seed=21)
        add_decoder(weights, facts, "int4", block, kv)
    native = NativeOperators.of((kv,) * facts.layers)
    for name, operators in ((contract.DECODER_FILE, StockOperators), (contract.NATIVE_DECODER_FILE, native)):
        builder = build_decoder(facts, weights.stored, operators=operators)
        functions = StockOperators.functions(facts) if operators is StockOperators else []
        (folder / name).write_bytes(builder.serialize("decoder", "benchmark", functions))


def add_decoder(
    weights: RandomWeights, facts: DecoderFacts, dtype: str, block: int, kv: str, embedding: Any = None
) -> None:
    """Every weight of a decoder.

    Args:
      dtype: of the linear maps; quantised ones have a head of 8 bits.
      kv: int8 or float32; each layer's keys have an offset in an int8 cache.
      embedding: where the stored embedding table lies, which a tied head that is not quantised refers to.
    """
    from export.native import key_offset_name

    width, inner = facts.hidden_size, facts.intermediate_size
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    for layer in range(facts.layers):
        name = f"layers.{layer}."
        weights.vector(name + "input_norm", width, around=1.0)
        weights.matrix(name + "qkv", width, queries + 2 * keys, dtype, block)
        weights.vector(name + "qkv.bias", queries + 2 * keys)
        weights.matrix(name + "attention_output", queries, width, dtype, block)
        weights.vector(name + "post_norm", width, around=1.0)
        weights.matrix(name + "gate_up", width, 2 * inner, dtype, block)
        weights.matrix(name + "down", inner, width, dtype, block)
        if kv == "int8":
            weights.key_offset(key_offset_name(layer), facts.num_kv_heads, facts.head_dim)
    weights.vector("final_norm", width, around=1.0)
    if dtype in ("int8", "int4"):
        weights.matrix("head", width, facts.vocab_size, "int8", HEAD_BLOCK)
    elif facts.tied_embeddings and embedding is not None:
        weights.stored["head.weight"] = embedding
    else:
        weights.stored["head.weight"] = weights.table((facts.vocab_size, width), dtype, width**-0.5)


def _write_vision(folder: Path, size: str) -> None:
    from export.native import NativeOperators
    from export.stock import StockOperators
    from export.vision import build_vision
    from export.weight_store import WeightFile

    facts = model_facts(DECODERS[size], TOWERS[size])
    with WeightFile(folder / "vision.onnx.data") as file:
        weights = RandomWeights(file, seed=22)
        add_vision(weights, facts, "int8")
    native = NativeOperators.of(("int8",) * facts.decoder.layers)
    for name, operators in ((contract.VISION_FILE, StockOperators), (contract.NATIVE_VISION_FILE, native)):
        builder = build_vision(facts, weights.stored, operators=operators)
        (folder / name).write_bytes(builder.serialize("vision", "benchmark"))


def model_facts(decoder: DecoderFacts, tower: VisionFacts) -> Any:
    """Both parts as `export` takes them."""
    from export.config import ModelFacts

    return ModelFacts(decoder, tower, PATCH, MERGE, 2)


def add_vision(weights: RandomWeights, facts: Any, dtype: str) -> None:
    """Every weight of a vision tower; `dtype` is that of its linear maps."""
    from export.quantize import padded_width

    tower = facts.vision
    width, inner = tower.hidden_size, tower.intermediate_size
    if dtype == "int8":
        inner = padded_width(inner, VISION_BLOCK)
    merged = width * MERGE**2
    weights.matrix("patch_embed", facts.patch_values, width, "float32" if dtype == "float32" else "float16", 1)
    for block in range(tower.depth):
        name = f"blocks.{block}."
        for norm in ("norm1", "norm2"):
            weights.vector(name + norm, width, around=1.0)
        for part, inputs, outputs in (
            ("qkv", width, 3 * width),
            ("attention_output", width, width),
            ("gate_up", width, 2 * inner),
            ("down", inner, width),
        ):
            weights.matrix(name + part, inputs, outputs, dtype, VISION_BLOCK)
            weights.vector(f"{name}{part}.bias", outputs)
    weights.vector("merger.norm", width, around=1.0)
    for part, outputs in (("hidden", merged), ("output", tower.out_hidden_size)):
        weights.matrix(f"merger.{part}", merged, outputs, dtype, VISION_BLOCK)
        weights.vector(f"merger.{part}.bias", outputs)

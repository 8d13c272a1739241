"""An int8 KV cache on a model whose keys carry Qwen2.5's huge bias: the part that all keys share stays out of it.

The same measure is taken without that, and must fail: otherwise the fixture would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import needs_kernels
from native_operators import native_graph, span_attention
from tiny_checkpoint import write_checkpoint

from apps.bench.kernel_cases import rotate
from edge import contract, native
from edge.backends.base import CacheView
from edge.backends.ort import OrtBackend
from edge.bundle import open_bundle
from edge.errors import ParityError
from edge.rope import MultimodalRope, decoder_rope, text_positions
from export import weights as export_weights
from export.api import export_checkpoint
from export.graph_kinds import NativeGraphs
from export.key_offset import key_offset
from export.native import key_offset_name

LOGIT_RMS = 0.05
DIVERGENCE = 1e-3
OUTPUT_ERROR = 0.03
BIAS_NORM = 605.0
HEAD_DIM, QUERY_HEADS, CACHED, QUERIES, TURN = 128, 8, 4096, 8, 32


Attend = Callable[..., np.ndarray]


def numpy_attention(*tensors: Any, caches: list[np.ndarray], **options: Any) -> np.ndarray:
    qkv, bias, cos, sin, *rest = tensors
    return span_attention(qkv, bias, cos, sin, caches, *rest, scale=HEAD_DIM**-0.5, **options)


def native_attention(*tensors: Any, caches: list[np.ndarray], **options: Any) -> np.ndarray:
    qkv, bias, cos, sin, *rest = tensors
    scales = dict(zip(("key_scales", "value_scales"), caches[2:], strict=False))
    return native.attention(qkv, cos, sin, *caches[:2], *rest, qkv_bias=bias, **scales, **options)


IMPLEMENTATIONS = [
    pytest.param(numpy_attention, id="numpy"),
    pytest.param(native_attention, id="native", marks=needs_kernels),
]


@dataclass
class Layer:
    """One layer's tokens: what projections give them, and the biases that are added to it."""

    qkv: np.ndarray  # (T, (Hq + 2) D), one KV head
    bias: np.ndarray
    cos: np.ndarray
    sin: np.ndarray

    @property
    def key_bias(self) -> np.ndarray:
        return self.bias[QUERY_HEADS * HEAD_DIM :][:HEAD_DIM]

    def run(self, attend: Attend, caches: list[np.ndarray], offset: np.ndarray | None) -> np.ndarray:
        """Fill the caches with all tokens but the last, in turns; then let the last attend to all: (Q, Hq D)."""
        options: dict[str, Any] = {"query_heads": QUERY_HEADS}
        if offset is not None:
            options |= {"key_offset": offset, "slot_cos": self.cos, "slot_sin": self.sin}
        run = (np.ones((1, HEAD_DIM // 2), np.float32), np.zeros((1, HEAD_DIM // 2), np.float32))

        def append(first: int, last: int, spans: list[tuple[int, int, int]]) -> np.ndarray:
            slots, rows = np.arange(first, last, dtype=np.int32), slice(first, last)
            tables = (slots, np.array(spans, np.int32).reshape(-1, 3), *run)
            tensors = (self.qkv[rows], self.bias, self.cos[rows], self.sin[rows])
            return attend(*tensors, *tables, caches=caches, **options)

        for first in range(0, CACHED, TURN):
            append(first, first + TURN, [])
        return append(CACHED, CACHED + QUERIES, [(0, CACHED, 0)])

    def logits(self, caches: list[np.ndarray], offset: np.ndarray | None) -> np.ndarray:
        """(Hq, Q, CACHED): scores of the last tokens with what is cached."""
        queries = (self.qkv + self.bias)[-QUERIES:, : QUERY_HEADS * HEAD_DIM].astype(np.float64)
        queries = queries.reshape(QUERIES, QUERY_HEADS, HEAD_DIM).transpose(1, 0, 2)
        keys = caches[0][0, :CACHED].astype(np.float64)
        if len(caches) == 4:
            keys = keys * caches[2][0, :CACHED, None]
        if offset is not None:
            keys = keys + rotate(offset.astype(np.float64), self.cos[:CACHED], self.sin[:CACHED])
        return rotate(queries, self.cos[-QUERIES:], self.sin[-QUERIES:]) @ keys.T * HEAD_DIM**-0.5

    @cached_property
    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and logits with a cache that is not quantised."""
        caches = empty_caches("float32")
        return self.run(numpy_attention, caches, None), self.logits(caches, None)


@pytest.fixture(scope="module", params=[0, 1])
def layer(request: pytest.FixtureRequest) -> Layer:
    """Unit-variance queries, keys and values, and a key bias of norm 605 in 8 channels."""
    rng = np.random.default_rng(request.param)
    tokens, width = CACHED + QUERIES, (QUERY_HEADS + 2) * HEAD_DIM
    bias = 0.1 * rng.standard_normal(width)
    large = rng.standard_normal(8)
    channels = QUERY_HEADS * HEAD_DIM + rng.choice(HEAD_DIM, 8, replace=False)
    bias[channels] = BIAS_NORM * large / np.linalg.norm(large)
    cos, sin = MultimodalRope(HEAD_DIM, 1e6, (16, 24, 24)).tables(text_positions(0, tokens))
    qkv = rng.standard_normal((tokens, width)).astype(np.float32)
    return Layer(qkv, bias.astype(np.float32), cos, sin)


def empty_caches(dtype: str) -> list[np.ndarray]:
    capacity = CACHED + QUERIES
    caches = [np.zeros((1, capacity, HEAD_DIM), dtype) for _ in range(2)]
    return caches + [np.zeros((1, capacity), np.float32) for _ in range(2 if dtype == "int8" else 0)]


def exported_offset(layer: Layer) -> np.ndarray | None:
    """What export takes off these keys: weights whose products have unit variance, as above."""
    weight = np.full((HEAD_DIM, 64), 64**-0.5, np.float32)
    return key_offset(layer.key_bias, weight, np.ones(64, np.float32), HEAD_DIM)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def errors(layer: Layer, attend: Attend, offset: np.ndarray | None) -> tuple[float, float, float]:
    """RMS error of the logits, mean divergence of the weights, relative error of the output, for an int8 cache."""
    wanted, expected = layer.exact
    caches = empty_caches("int8")
    output, logits = layer.run(attend, caches, offset), layer.logits(caches, offset)
    divergence = (np.exp(log_softmax(expected)) * (log_softmax(expected) - log_softmax(logits))).sum(axis=-1)
    relative = np.linalg.norm(output - wanted) / np.linalg.norm(wanted)
    return float(np.sqrt(np.mean((logits - expected) ** 2))), float(divergence.mean()), float(relative)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_an_int8_cache_keeps_the_logits_of_keys_with_a_huge_bias(layer: Layer, attend: Attend) -> None:
    offset = exported_offset(layer)
    assert offset is not None and 8 <= np.count_nonzero(offset) <= 16  # the pairs of eight channels
    rms, divergence, relative = errors(layer, attend, offset)
    assert rms <= LOGIT_RMS and divergence <= DIVERGENCE and relative <= OUTPUT_ERROR


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_without_the_offset_the_same_cache_is_far_beyond_the_limits(layer: Layer, attend: Attend) -> None:
    rms, divergence, _ = errors(layer, attend, None)
    assert rms > 5 * LOGIT_RMS and divergence > 5 * DIVERGENCE


def test_a_layer_whose_bias_is_no_larger_than_its_keys_has_no_offset() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2 * 64, 256)).astype(np.float32) / 16
    norm_weight = np.ones(256, np.float32)
    assert key_offset(rng.standard_normal(128).astype(np.float32), weight, norm_weight, 64) is None
    assert key_offset(np.zeros(128, np.float32), weight, norm_weight, 64) is None
    bias = np.zeros(128, np.float32)
    bias[70] = 50
    offset = key_offset(bias, weight, norm_weight, 64)
    assert offset is not None and offset.shape == (2, 64)
    assert np.flatnonzero(offset).tolist() == [70]
    assert key_offset(bias, weight, 20 * norm_weight, 64) is None  # tokens contribute as much


# A whole model ----------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 1, "head_dim": 64, "layers": 3, "intermediate_size": 256}
TURNS, TURN_TOKENS = 5, 64


@dataclass
class Models:
    """One checkpoint with a huge key bias in its first and last layer, and its bundles by kind of cache."""

    folders: dict[str, Path]

    def manifest(self, kind: str) -> contract.Manifest:
        return contract.manifest_from_json(json.loads((self.folders[kind] / contract.MANIFEST_FILE).read_text()))

    def conversation(self) -> list[np.ndarray]:
        """Token embeddings of each turn, (T, W)."""
        manifest = self.manifest("fp32")
        table = np.fromfile(self.folders["fp32"] / manifest.embedding.file, manifest.embedding.dtype)
        table = table.reshape(manifest.embedding.rows, -1).astype(np.float32)
        rng = np.random.default_rng(0)
        return [table[rng.integers(0, 256, TURN_TOKENS)] for _ in range(TURNS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("bias")
    write_checkpoint(folder / "checkpoint", key_bias_norm=BIAS_NORM, **SHAPE)
    for kv in ("fp32", "int8"):
        export_checkpoint(folder / "checkpoint", folder / kv, kv=kv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_weights, "key_offset", lambda *_: None)
        export_checkpoint(folder / "checkpoint", folder / "naive", kv="int8", allow_mismatch=True)
    return Models({kind: folder / kind for kind in ("fp32", "int8", "naive")})


def numpy_logits(models: Models, kind: str) -> np.ndarray:
    """Logits (TURNS, V) of a bundle's native graph, with the operators in numpy."""
    manifest = models.manifest(kind)
    graph = native_graph(models.folders[kind] / manifest.decoder.native_file)
    facts, graphs = manifest.decoder_facts, NativeGraphs("", manifest.kv_dtypes)
    turns = models.conversation()
    positions = [text_positions(i * TURN_TOKENS, TURN_TOKENS) for i in range(TURNS)]
    tables = [decoder_rope(facts).tables(part) for part in positions]
    caches, logits = graphs.caches(facts, range(facts.layers), TURNS * TURN_TOKENS), []
    for i, embeds in enumerate(turns):
        feeds = {contract.INPUTS_EMBEDS: embeds, **graphs.append(tables, i), **caches}
        found, *updated = graph.run(None, {name: feeds[name] for name in graph.input_names})
        caches = dict(zip(caches, updated, strict=True))
        logits.append(found[0])
    return np.stack(logits)


def backend_logits(models: Models, kind: str) -> np.ndarray:
    """Logits (TURNS, V) of a bundle in the runtime's own backend."""
    bundle = open_bundle(models.folders[kind])
    backend = OrtBackend(bundle)
    backend.allocate_cache(TURNS * TURN_TOKENS)
    rope, half = decoder_rope(bundle.manifest.decoder_facts), bundle.manifest.decoder_facts.head_dim // 2
    run = (np.ones((1, half), np.float32), np.zeros((1, half), np.float32))
    logits = []
    for i, embeds in enumerate(models.conversation()):
        first = i * TURN_TOKENS
        slots = np.arange(first, first + TURN_TOKENS, dtype=np.int32)
        view = CacheView(slots, np.array([(0, first, 0)][: min(i, 1)], np.int32).reshape(-1, 3), *run)
        cos, sin = rope.tables(text_positions(first, TURN_TOKENS))
        logits.append(backend.run_decoder(embeds, cos, sin, view).copy())
    return np.stack(logits)


RUNNERS = [pytest.param(numpy_logits, id="numpy"), pytest.param(backend_logits, id="backend", marks=needs_kernels)]


@pytest.mark.parametrize("logits_of", RUNNERS)
def test_a_model_with_a_huge_key_bias_answers_the_same_with_an_int8_cache(
    models: Models, logits_of: Callable[[Models, str], np.ndarray]
) -> None:
    graph = models.manifest("int8")
    assert key_offset_name(0) in offsets(models, "int8") and set(graph.kv_dtypes) == {"int8"}
    assert offsets(models, "int8") == {key_offset_name(0), key_offset_name(2)} and not offsets(models, "naive")
    expected, found, naive = (log_softmax(logits_of(models, kind).astype(np.float64)) for kind in models.folders)
    divergence, naive_divergence = (
        float((np.exp(expected) * (expected - other)).sum(axis=1).mean()) for other in (found, naive)
    )
    rms, naive_rms = (float(np.sqrt(np.mean((other - expected) ** 2))) for other in (found, naive))
    assert rms <= LOGIT_RMS and divergence <= DIVERGENCE
    assert naive_rms > 2 * LOGIT_RMS and naive_divergence > 2 * DIVERGENCE


@needs_kernels
def test_the_caches_take_the_bytes_that_the_manifest_announces(models: Models) -> None:
    for folder in models.folders.values():
        bundle = open_bundle(folder)
        backend = OrtBackend(bundle)
        backend.allocate_cache(100)
        assert sum(array.nbytes for array in backend.cache.values()) == 100 * bundle.manifest.kv_bytes_per_token


@needs_kernels
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_the_gate_refuses_a_naive_int8_cache_of_such_a_model_and_takes_ours(
    models: Models, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = models.folders["fp32"].parent / "checkpoint"
    ours = export_checkpoint(checkpoint, tmp_path / "ours", weights=weights, kv="int8").parity["native"]
    limit = ours["thresholds"]["int8_kv_kl_mean"]
    assert ours["passed"] and ours["int8_kv_kl_mean"] < limit / 3
    monkeypatch.setattr(export_weights, "key_offset", lambda *_: None)
    with pytest.raises(ParityError, match=r"native graphs differ .* int8_kv_kl_mean [\d.]+, at most 0.001 expected"):
        export_checkpoint(checkpoint, tmp_path / "naive", weights=weights, kv="int8")
    assert not (tmp_path / "naive").exists()


def offsets(models: Models, kind: str) -> set[str]:
    """Names of the key offsets in a bundle's native decoder."""
    import onnx

    path = models.folders[kind] / contract.NATIVE_DECODER_FILE
    graph = onnx.load(path, load_external_data=False).graph
    return {tensor.name for tensor in graph.initializer if tensor.name.endswith("key_offset")}

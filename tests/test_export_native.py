"""The native graphs compute what the stock graphs compute, over the same bytes of weights.

They are run by onnx's evaluator with our operators in numpy; with the built library the export itself compares them.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_cases import needs_kernels
from native_operators import native_graph
from tiny_checkpoint import write_checkpoint

from edge import contract, native
from edge.bundle import open_bundle
from edge.embeddings import Embeddings
from edge.errors import BundleError, UsageError
from export import graph_check, proof
from export.api import export_checkpoint
from export.checkpoint import open_checkpoint
from export.graph_kinds import NativeGraphs, StockGraphs
from export.graph_session import EXACT, GraphSession
from export.parity import greatest_error
from export.probe import Probe, build_probe
from export.tokens import token_ids

SHAPES: dict[str, dict[str, Any]] = {
    "8:1 heads, tied": {"heads": 8, "kv_heads": 1, "head_dim": 16},
    "7:1 heads, untied, padded": {"heads": 7, "kv_heads": 1, "head_dim": 32, "tied": False, "intermediate_size": 88},
}


class Bundles:
    """One checkpoint, exported as asked."""

    def __init__(self, folder: Path, **shape: Any) -> None:
        self.folder = folder
        write_checkpoint(folder / "checkpoint", **shape)
        self.facts = open_checkpoint(folder / "checkpoint").facts

    def export(self, weights: str, kv: str) -> tuple[Path, contract.Manifest]:
        path = self.folder / f"{weights}-{kv}"
        if path.exists():
            return path, contract.manifest_from_json(json.loads((path / "manifest.json").read_text()))
        return path, export_checkpoint(self.folder / "checkpoint", path, weights=weights, kv=kv)


@pytest.fixture(scope="module", params=list(SHAPES))
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("native"), **SHAPES[request.param])


def probe_of(folder: Path, manifest: contract.Manifest) -> Probe:
    tokenizer = (folder / contract.TOKENIZER_FILE).read_bytes()
    rows = manifest.embedding.rows
    return build_probe(manifest.preprocess, token_ids(tokenizer, manifest.protocol, rows), tokenizer)


def run_vision(session: Any, kind: StockGraphs, bundles: Bundles, probe: Probe) -> list[np.ndarray]:
    frames = []
    for patches, rows, columns in probe.frames:
        tables = kind.frame(bundles.facts, rows, columns)
        embeds = run(session, {contract.PATCHES: tables.arranged(patches), **tables.feeds})[0]
        frames.append(tables.restored(embeds))
    return frames


def run_decoder(session: Any, kind: StockGraphs, bundles: Bundles, probe: Probe, embeds: list[Any]) -> np.ndarray:
    from edge.rope import decoder_rope

    facts = bundles.facts.decoder
    tables = [decoder_rope(facts).tables(append.positions) for append in embeds]
    caches = kind.caches(facts, range(facts.layers), sum(len(cos) for cos, _ in tables))
    logits = []
    for i, append in enumerate(embeds):
        feeds = {contract.INPUTS_EMBEDS: append.embeds, **kind.append(tables, i), **caches}
        found, *updated = run(session, feeds)
        caches = dict(zip(caches, updated, strict=True))
        logits.append(found)
    return np.concatenate(logits)


def run(session: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    if isinstance(session, GraphSession):
        return session.run(feeds)
    return session.run(None, {name: feeds[name] for name in session.input_names})


# The stock graph's products take float inputs here, as the operators in numpy do; so only an int8 cache differs.
@pytest.mark.parametrize(
    ("weights", "kv", "limit"),
    [("fp32", "fp32", 1e-4), ("fp16", "int8", 3e-2), ("int8", "fp32", 1e-4), ("int4", "int8", 3e-2)],
)
def test_native_graphs_compute_what_the_stock_graphs_compute(
    bundles: Bundles, weights: str, kv: str, limit: float
) -> None:
    folder, manifest = bundles.export(weights, kv)
    probe = probe_of(folder, manifest)
    stock, own = StockGraphs(), NativeGraphs("", manifest.kv_dtypes)
    expected = run_vision(GraphSession(folder / manifest.vision.file, EXACT), stock, bundles, probe)
    frames = run_vision(native_graph(folder / manifest.vision.native_file), own, bundles, probe)
    assert greatest_error(frames, expected) <= 1e-4

    rows = Embeddings(manifest.embedding, folder / manifest.embedding.file).rows(probe.ids.tolist())
    appends = probe.appends(rows.astype(np.float32), expected)
    wanted = run_decoder(GraphSession(folder / manifest.decoder.file, EXACT), stock, bundles, probe, appends)
    found = run_decoder(native_graph(folder / manifest.decoder.native_file), own, bundles, probe, appends)
    assert greatest_error(found, wanted) <= limit


def test_native_graphs_name_the_same_bytes_and_as_few_operators_as_they_can(bundles: Bundles) -> None:
    folder, manifest = bundles.export("int4", "int8")
    layers, depth = manifest.decoder_facts.layers, manifest.vision_facts.depth
    counts = {}
    for part in (manifest.vision, manifest.decoder):
        stock, own = (onnx.load(folder / file, load_external_data=False) for file in (part.file, part.native_file))
        places = [{t.name: external(t) for t in graph.graph.initializer if t.external_data} for graph in (stock, own)]
        assert places[0].items() <= places[1].items()
        extra = {name for name in places[1] if name not in places[0]}
        assert all(name.endswith("key_offset") for name in extra)
        codes = [t for t in own.graph.initializer if t.name in scaled(places[1])]
        assert all(t.data_type == onnx.TensorProto.UINT8 and t.dims == [external(t)[2]] for t in codes) and codes
        counts[part.file] = Counter(node.op_type for node in own.graph.node)
        assert not own.functions
    decoder, vision = counts[manifest.decoder.file], counts[manifest.vision.file]
    assert decoder["StreamMatMul"] == 4 * layers + 1 and decoder["SpanAttentionInt8"] == layers
    assert sum(decoder.values()) == (4 + 1 + 2) * layers + 2 + 2  # and the head's norm and map, two last rows
    assert vision["StreamMatMul"] == 4 * depth + 2 and vision["WindowAttention"] == depth
    assert not decoder["DequantizeLinear"] and not vision["DequantizeLinear"]
    gated = [n for n in own.graph.node for a in n.attribute if a.name == "gated" and a.i]
    assert len(gated) == layers


def external(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries["offset"]), int(entries["length"])


def scaled(names: Any) -> set[str]:
    """The codes that have scales beside them."""
    return {name.removesuffix(".scale") + ".weight" for name in names if name.endswith(".scale")}


@pytest.mark.parametrize(("weights", "kv"), [("int8", "fp32"), ("int4", "int8")])
def test_native_graphs_take_what_the_contract_says(bundles: Bundles, weights: str, kv: str) -> None:
    folder, manifest = bundles.export(weights, kv)
    assert manifest.kv_dtypes == ("int8" if kv == "int8" else "float32",) * 2
    assert {manifest.vision.native_file, manifest.decoder.native_file} <= manifest.files.keys()
    graph = onnx.load(folder / manifest.decoder.native_file, load_external_data=False).graph
    names = [value.name for value in graph.input]
    head = [contract.INPUTS_EMBEDS, contract.ROPE_COS, contract.ROPE_SIN, contract.NEW_SLOTS, contract.SPANS,
            contract.RUN_COS, contract.RUN_SIN]  # fmt: skip
    own = [("key_cache", "value_cache"), ("key_scales", "value_scales")][: 2 if kv == "int8" else 1]
    caches = [f"{name}.{layer}" for layer in range(2) for pair in own for name in pair]
    offset = any(t.name.endswith("key_offset") for t in graph.initializer)
    assert names == [*head, *caches, *([contract.SLOT_COS, contract.SLOT_SIN] if offset else [])]
    assert [value.name for value in graph.output] == [contract.LOGITS, *map(contract.updated, caches)]
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert kinds["key_cache.0"] == (onnx.TensorProto.INT8 if kv == "int8" else onnx.TensorProto.FLOAT)
    vision = onnx.load(folder / manifest.vision.native_file, load_external_data=False).graph
    assert [v.name for v in vision.input] == [
        contract.PATCHES, contract.VISION_COS, contract.VISION_SIN, contract.WINDOW_STARTS,
    ]  # fmt: skip


def test_a_bundle_that_does_not_list_its_native_graph_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundles.export("fp32", "fp32")[0], tmp_path / "bundle"))
    document = json.loads((folder / contract.MANIFEST_FILE).read_text())
    del document["files"][contract.NATIVE_DECODER_FILE]
    document[contract.CHECKSUM] = contract.checksum_of(document)
    (folder / contract.MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"does not list the file `decoder\.native\.onnx` that it uses"):
        open_bundle(folder)


def test_the_cache_counts_what_it_takes(bundles: Bundles) -> None:
    facts = bundles.facts.decoder
    rows = facts.layers * 2 * facts.num_kv_heads
    _, plain = bundles.export("int8", "fp32")
    _, quantised = bundles.export("int4", "int8")
    assert plain.kv_bytes_per_token == plain.stock_kv_bytes_per_token == rows * 4 * facts.head_dim
    assert quantised.kv_bytes_per_token == rows * (facts.head_dim + 4)
    assert quantised.stock_kv_bytes_per_token == plain.kv_bytes_per_token


def test_an_int8_cache_is_the_default_beside_quantised_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    kinds = {
        weights: set(export_checkpoint(tmp_path / "checkpoint", tmp_path / weights, weights=weights).kv_dtypes)
        for weights in ("fp16", "int8")
    }
    assert kinds == {"fp16": {"float32"}, "int8": {"int8"}}
    with pytest.raises(UsageError, match="KV cache 'int3'"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", kv="int3")


def test_a_model_that_the_operators_do_not_cover_gets_stock_graphs_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", heads=8, kv_heads=2, head_dim=8)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4")
    assert manifest.decoder.native_file == manifest.vision.native_file == ""
    assert set(manifest.kv_dtypes) == {"float32"}
    assert "no native graphs: heads of the decoder are 8 wide" in manifest.source["notes"][0]
    with pytest.raises(UsageError, match="needs the native operators"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "other", kv="int8")


@needs_kernels
@pytest.mark.parametrize(("weights", "kv"), [("fp32", "fp32"), ("fp16", "int8"), ("int8", "fp32"), ("int4", "int8")])
def test_the_export_proves_the_native_graphs_with_the_library(bundles: Bundles, weights: str, kv: str) -> None:
    _, manifest = bundles.export(weights, kv)
    report = manifest.parity["native"]
    assert report["passed"] and report["instruction_set"] == native.instruction_set()
    if (weights, kv) == ("fp32", "fp32"):
        assert report["logits_relative_error"] <= 1e-4 and report["vision_relative_error"] <= 1e-4


@needs_kernels
def test_native_slices_of_layers_compute_what_the_whole_graph_computes(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = bundles.export("int4", "int8")
    monkeypatch.setattr(proof, "_weights_budget_bytes", lambda checkpoint: 1)
    monkeypatch.setattr(graph_check, "HEAD_PIECE_BYTES", 20_000)
    sliced = export_checkpoint(bundles.folder / "checkpoint", tmp_path / "bundle", weights="int4")
    assert sliced.files == whole.files
    for figure in ("vision_relative_error", "logits_relative_error"):
        assert sliced.parity["native"][figure] == pytest.approx(whole.parity["native"][figure], rel=0.5, abs=1e-6)


def test_every_layer_is_checked_for_a_key_offset_only_where_its_cache_is_int8(bundles: Bundles) -> None:
    for weights, kv in (("fp32", "fp32"), ("int4", "int8")):
        folder, manifest = bundles.export(weights, kv)
        graph = onnx.load(folder / manifest.decoder.native_file, load_external_data=False).graph
        offsets = [t for t in graph.initializer if t.name.endswith("key_offset")]
        assert all(t.dims == [manifest.decoder_facts.num_kv_heads, manifest.decoder_facts.head_dim] for t in offsets)
        assert kv == "int8" or not offsets

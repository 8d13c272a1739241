"""The TensorRT graphs compute what the native graphs compute, in float16 where float16 holds it.

They are run by onnx's evaluator with our plugin's operators in numpy. No TensorRT is involved.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from native_operators import native_graph
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from tensorrt_operators import TensorRTGraphs, tensorrt_graph
from test_export_bundle import TENSORRT_OPERATORS
from test_export_native import Bundles, external, probe_of, run_decoder, run_vision

from edge import contract
from edge.embeddings import Embeddings
from export.api import export_checkpoint
from export.graph_kinds import NativeGraphs
from export.onnx_writer import GraphBuilder
from export.parity import greatest_error
from export.tensorrt import TensorRTOperators, half_scale_name, has_own_product
from export.weight_store import StoredTensor

HALF_ERROR = 5e-3
"""Of logits after two layers of products in float16, as a part of the largest."""
OURS = {contract.TABLE_ATTENTION, contract.PLUGIN_MATMUL}
KINDS = [("fp32", "fp32", 32), ("fp16", "int8", 32), ("int8", "int8", 32), ("int4", "int8", 64), ("int4", "fp32", 32)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("tensorrt"))


def exported(bundles: Bundles, weights: str, kv: str, block: int) -> tuple[Path, contract.Manifest]:
    path = bundles.folder / f"{weights}-{kv}-{block}"
    if path.exists():
        return path, contract.manifest_from_json(json.loads((path / contract.MANIFEST_FILE).read_text()))
    return path, export_checkpoint(bundles.folder / "checkpoint", path, weights=weights, kv=kv, block_size=block)


@pytest.mark.parametrize(("weights", "kv", "block"), KINDS)
def test_tensorrt_graphs_compute_what_the_native_graphs_compute(
    bundles: Bundles, weights: str, kv: str, block: int
) -> None:
    folder, manifest = exported(bundles, weights, kv, block)
    probe = probe_of(folder, manifest)
    native, own = NativeGraphs("", manifest.kv_dtypes), TensorRTGraphs(manifest.kv_dtypes)
    expected = run_vision(native_graph(folder / manifest.vision.native_file), native, bundles, probe)
    frames = run_vision(tensorrt_graph(folder / manifest.vision.tensorrt_file), own, bundles, probe)
    assert greatest_error(frames, expected) <= HALF_ERROR

    rows = Embeddings(manifest.embedding, folder / manifest.embedding.file).rows(probe.ids.tolist())
    appends = probe.appends(rows.astype(np.float32), expected)
    wanted = run_decoder(native_graph(folder / manifest.decoder.native_file), native, bundles, probe, appends)
    found = run_decoder(tensorrt_graph(folder / manifest.decoder.tensorrt_file), own, bundles, probe, appends)
    assert greatest_error(found, wanted) <= HALF_ERROR


@pytest.mark.parametrize(("weights", "kv", "block"), [("fp16", "int8", 32), ("int4", "int8", 64)])
def test_tensorrt_graphs_hold_only_operators_that_its_parser_takes_and_our_own(
    bundles: Bundles, weights: str, kv: str, block: int
) -> None:
    folder, manifest = exported(bundles, weights, kv, block)
    for part in (manifest.vision, manifest.decoder):
        model = onnx.load(folder / part.tensorrt_file, load_external_data=False)
        assert {node.op_type for node in model.graph.node} <= TENSORRT_OPERATORS | OURS
        assert not model.functions and {entry.domain: entry.version for entry in model.opset_import}[""] <= 21
        assert all(name for node in model.graph.node for name in node.input), "a plugin takes no empty input"
        for node in model.graph.node:
            own = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert (node.op_type in OURS) == (own.get("plugin_namespace") == b"streamo")


def test_weights_are_the_same_bytes_and_only_scales_are_written_anew(bundles: Bundles) -> None:
    folder, manifest = exported(bundles, "int4", "int8", 64)
    stock, own = (
        {t.name: t for t in onnx.load(folder / file, load_external_data=False).graph.initializer if t.external_data}
        for file in (manifest.decoder.file, manifest.decoder.tensorrt_file)
    )
    half = {name for name in own if name not in stock and not name.endswith("key_offset")}
    assert half and all(external(own[name])[0] == contract.TENSORRT_DATA_FILE for name in half)
    for name in own.keys() & stock.keys():
        assert external(own[name]) == external(stock[name])
    for name in half:
        weight = own[name.removesuffix(".half_scale") + ".weight"]
        assert own[name].data_type == TensorProto.FLOAT16 and weight.data_type == TensorProto.INT4
        assert weight.dims[0] // own[name].dims[0] in contract.TENSORRT_INT4_BLOCKS


def test_what_tensorrt_has_no_product_for_goes_to_the_plugin(bundles: Bundles) -> None:
    counts = {}
    for block in (32, 64):
        folder, manifest = exported(bundles, "int4", "int8" if block == 64 else "fp32", block)
        graph = onnx.load(folder / manifest.decoder.tensorrt_file, load_external_data=False).graph
        counts[block] = Counter(node.op_type for node in graph.node)
        assert (contract.TENSORRT_DATA_FILE in manifest.files) == (block == 64)
    assert counts[32]["StreamoMatMul"] == 4 * 2 + 1 and not counts[32]["DequantizeLinear"]
    assert counts[64]["DequantizeLinear"] == 3 * 2, "the inner width of 96 has no block of 64"
    assert counts[64]["StreamoMatMul"] == 2 + 1, "down in blocks of 32, and the head in 8 bits"


def test_products_are_float16_and_what_lies_between_is_float32(bundles: Bundles) -> None:
    folder, manifest = exported(bundles, "fp16", "int8", 32)
    for file in (manifest.vision.tensorrt_file, manifest.decoder.tensorrt_file):
        graph = onnx.load(folder / file, load_external_data=False).graph
        producers = {output: node for node in graph.node for output in node.output}
        weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type in ("MatMul", "Gemm"):
                for name in node.input:
                    assert weights.get(name) == TensorProto.FLOAT16 or producers[name].attribute[0].i == 10, name
            if node.op_type in ("Add", "Div", "Softmax", "ReduceMean", "Pow"):
                kinds = [producers[name].op_type for name in node.input if name in producers]
                assert "MatMul" not in kinds and "Gemm" not in kinds, node.name


@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e6])
def test_rows_that_overflow_float16_go_through_the_mlp(tmp_path: Path, magnitude: float) -> None:
    """SwiGLU's product of 1e6 would be infinite in float16; one row's size does not change the other's digits."""
    generator = np.random.default_rng(5)
    gate_up, down = generator.normal(size=(16, 64)) / 4, generator.normal(size=(32, 16)) / 6
    stored = {}
    with (tmp_path / "weights").open("wb") as file:
        for name, values in (("mlp.gate_up.weight", gate_up), ("mlp.down.weight", down)):
            content = values.astype(np.float16).tobytes()
            stored[name] = StoredTensor("weights", file.tell(), len(content), "float16", values.shape)
            file.write(content)
    builder = GraphBuilder(stored)
    values = builder.input("values", "float32", ("T", 16))
    residual = builder.input("residual", "float32", ("T", 16))
    TensorRTOperators(builder).gated_mlp(values, "mlp", residual=residual, output="result")
    builder.output("result", "float32", ("T", 16))
    (tmp_path / "graph.onnx").write_bytes(builder.serialize("mlp", "test"))

    rows = generator.normal(size=(2, 16)).astype(np.float32)
    rows[0] *= np.sqrt(magnitude)
    stream = np.full((2, 16), 3e4, np.float32)
    found = ReferenceEvaluator(str(tmp_path / "graph.onnx")).run(None, {"values": rows, "residual": stream})[0]
    both = rows.astype(np.float64) @ gate_up
    gate, up = np.split(both, 2, axis=1)
    wanted = gate / (1 + np.exp(-gate)) * up @ down
    for row in range(2):
        error = np.abs(found[row] - stream[row] - wanted[row]).max()
        assert error <= 4e-3 * np.abs(wanted[row]).max() + 4e-3, (row, error)  # 4e-3: float32's step at 3e4


def test_scales_too_small_for_float16_stay_above_zero(tmp_path: Path) -> None:
    from export.tensorrt import write_half_scales
    from export.weight_store import WeightFile

    scales = np.array([[1e-30, 3e-8, 0.5, 1e6]], np.float32)
    (tmp_path / "w").write_bytes(scales.tobytes())
    stored = {
        "a.scale": StoredTensor("w", 0, scales.nbytes, "float32", scales.shape),
        "a.weight": StoredTensor("w", 0, 128, "int4", (64, 4)),
    }
    with WeightFile(tmp_path / "half") as file:
        place = write_half_scales(tmp_path, stored, file)[half_scale_name("a")]
    found = np.fromfile(tmp_path / "half", np.float16, 4, offset=place.offset)
    np.testing.assert_array_equal(found, np.array([2**-24, 2**-24, 0.5, 65504], np.float16))


@pytest.mark.parametrize(("inputs", "scales", "own"), [(128, 2, True), (256, 2, True), (129, 2, False), (96, 3, False)])
def test_tensorrt_multiplies_only_with_blocks_that_fill_the_weight(inputs: int, scales: int, own: bool) -> None:
    stored = {
        "w.weight": StoredTensor(file="", offset=0, length=0, dtype="int4", shape=(inputs, 8)),
        "w.scale": StoredTensor(file="", offset=0, length=0, dtype="float32", shape=(scales, 8)),
    }
    assert has_own_product(stored, "w") == own

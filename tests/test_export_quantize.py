"""Weights in 8 and 4 bits: the arithmetic, the packing, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny_checkpoint import write_checkpoint

from edge import contract
from edge.errors import ParityError
from export import components, proof
from export.api import export_checkpoint
from export.quantize import LARGEST, block_for, pack_int4, padded_width, quantize_blocks

ORT_VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
FUSES_INT8 = (1, 24)


@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(
        np.float32, st.tuples(st.sampled_from([16, 32, 96]), st.integers(1, 5)), elements=st.floats(-1e4, 1e4, width=32)
    ),
    dtype=st.sampled_from(["int8", "int4"]),
)
def test_every_value_is_within_half_a_step_of_its_code(values: np.ndarray, dtype: str) -> None:
    codes, scales = quantize_blocks(values, 16, dtype)
    assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() <= LARGEST[dtype]
    steps = np.repeat(scales, 16, axis=0).astype(np.float64)
    assert (scales > 0).all()
    tiny = np.finfo(np.float32).tiny * LARGEST[dtype]  # blocks of denormal values become zero
    assert (np.abs(values - codes * steps) <= np.where(np.abs(values) <= tiny, tiny, steps * (0.5 + 1e-5))).all()


def test_packing_is_that_of_onnx() -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (6, 10)).astype(np.int8)
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    assert pack_int4(codes).tobytes() == np.array(tensor.int32_data, np.uint8).tobytes()


def test_dequantizing_in_onnx_runtime_gives_code_times_scale() -> None:
    values = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
    for dtype, kind in (("int8", TensorProto.INT8), ("int4", TensorProto.INT4)):
        codes, scales = quantize_blocks(values, 32, dtype)
        packed = pack_int4(codes) if dtype == "int4" else codes
        node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["y"], axis=0, block_size=32)
        stored = helper.make_tensor("codes", kind, codes.shape, packed.tobytes(), raw=True)
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info("scales", TensorProto.FLOAT, scales.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)], [stored],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        np.testing.assert_array_equal(session.run(None, {"scales": scales})[0], codes * np.repeat(scales, 32, axis=0))


@pytest.mark.parametrize(("k", "wanted", "expected"), [(256, 32, 32), (48, 32, 16), (160, 128, 32), (72, 32, None)])
def test_a_block_divides_k_or_the_weight_stays_float(k: int, wanted: int, expected: int | None) -> None:
    assert block_for(k, wanted) == expected


@pytest.mark.parametrize(
    ("width", "block", "expected"), [(3420, 32, 3424), (3420, 128, 3456), (88, 16, 96), (80, 32, 80)]
)
def test_an_inner_width_that_no_block_divides_is_filled_up(width: int, block: int, expected: int) -> None:
    assert padded_width(width, block) == expected


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_onnx_runtime_turns_every_quantised_map_into_one_fused_operator(tmp_path: Path, weights: str) -> None:
    if weights == "int8" and ORT_VERSION < FUSES_INT8:
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} does not fuse 8-bit blocks")
    write_checkpoint(tmp_path / "checkpoint", layers=2)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights=weights, block_size=16)
    assert manifest.decoder.weights == weights and manifest.vision.weights == "int8"
    counts = optimized_operators(tmp_path, contract.DECODER_FILE)
    head_unfused = ORT_VERSION < FUSES_INT8
    assert counts["MatMulNBits"] == 4 * 2 + 1 - head_unfused  # qkv, output, gate_up, down of each layer; the head
    assert counts["DequantizeLinear"] == int(head_unfused) and not counts["Gemm"]
    if not head_unfused:
        counts = optimized_operators(tmp_path, contract.VISION_FILE)
        assert counts["MatMulNBits"] == 4 * 3 + 2 and not counts["DequantizeLinear"] and not counts["Gemm"]


def optimized_operators(folder: Path, file: str) -> Counter[str]:
    """How often each operator is in what ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "bundle" / file), options)
    optimized = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return Counter(node.op_type for node in optimized.graph.node)


def test_a_map_that_no_block_divides_stays_float16_and_is_noted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", heads=3, kv_heads=1, head_dim=8, layers=1)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4")
    notes = [note.split()[0] for note in manifest.source["notes"]]
    assert {"layers.0.qkv", "layers.0.attention_output", "layers.0.gate_up"} <= set(notes)
    assert manifest.parity["passed"]


def test_an_mlp_whose_width_no_block_divides_is_filled_up_with_zeros(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", intermediate_size=88, vision_intermediate=84)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4")
    notes = manifest.source["notes"]
    assert len(notes) == 2 and "blocks: MLPs are 96 wide" in notes[0] and "layers: MLPs are 96 wide" in notes[1]
    graph = onnx.load(tmp_path / "bundle" / contract.VISION_FILE, load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes["blocks.0.gate_up.weight"] == [64, 192] and shapes["blocks.0.down.weight"] == [96, 64]
    assert manifest.parity["passed"] and manifest.parity["rounded_relative_error"] <= 1e-4


@pytest.mark.parametrize(("weights", "shape"), [("int8", {"tied": False}), ("int4", {"intermediate_size": 88})])
def test_a_quantised_graph_computes_what_pytorch_computes_with_the_same_rounded_weights(
    tmp_path: Path, weights: str, shape: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", **shape)
    parity = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights=weights).parity
    assert parity["rounded_relative_error"] <= parity["thresholds"]["rounded_relative_error"] == 1e-4
    assert parity["logits_relative_error"] > 100 * parity["rounded_relative_error"]  # what rounding itself does


def test_a_wrong_graph_that_rounding_could_hide_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = components.write_decoder

    def damaged(writer: Any, *arguments: Any) -> None:
        original(writer, *arguments)
        one, two = "layers.0.input_norm", "layers.0.post_norm"
        writer.stored[one], writer.stored[two] = writer.stored[two], writer.stored[one]

    monkeypatch.setattr(components, "write_decoder", damaged)
    monkeypatch.setattr(proof, "_problems", lambda written: [])  # which would name the weights first
    write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ParityError, match=r"rounded_relative_error [\d.]+, at most 0.0001 expected") as caught:
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4")
    assert "logit_cosine_min" not in caught.value.message


def test_a_smaller_block_where_the_wanted_one_does_not_divide_is_noted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", intermediate_size=80)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4", block_size=32)
    assert any("layers.0.down has blocks of 16" in note for note in manifest.source["notes"])


def test_fewer_bits_make_a_smaller_bundle_that_is_still_near(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", heads=8, kv_heads=2, head_dim=16, layers=3)
    bytes_, cosines = [], []
    for weights in ("fp32", "fp16", "int8", "int4"):
        manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / weights, weights=weights)
        assert manifest.parity["passed"]
        bytes_.append(manifest.decoder.weights_bytes)
        cosines.append(manifest.parity["logit_cosine_min"])
    assert bytes_ == sorted(bytes_, reverse=True) and bytes_[0] > 4 * bytes_[3]
    assert cosines == sorted(cosines, reverse=True)

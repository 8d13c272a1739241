"""The TensorRT graphs compute what the native graphs compute, in float16 where float16 holds it.

They are run by onnx's evaluator with our plugin's operators in numpy. No TensorRT is involved.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tensorrt_operators import TensorRTGraphs, tensorrt_graph
from test_export_native import Bundles, external, probe_of, run_decoder, run_vision
from native_operators import native_graph

from edge import contract
from edge.embeddings import Embeddings
from export.graph_kinds import NativeGraphs
from export.onnx_writer import GraphBuilder
from export.parity import greatest_error
from export.tensorrt import LARGEST_INPUT, TensorRTOperators
from export.weight_store import WeightFile

OPERATORS = Path(__file__).with_name("data") / "tensorrt_operators.json"
SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 1, "head_dim": 32, "hidden_size": 256, "intermediate_size": 320}
HALF_ERROR = 5e-3
"""Of logits after two layers of products in float16."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("tensorrt"))


def exported(bundles: Bundles, weights: str, kv: str, block: int) -> tuple[Path, contract.Manifest]:
    from export.api import export_checkpoint

    path = bundles.folder / f"{weights}-{kv}-{block}"
    if path.exists():
        return path, contract.manifest_from_json(json.loads((path / contract.MANIFEST_FILE).read_text()))
    return path, export_checkpoint(bundles.folder / "checkpoint", path, weights=weights, kv=kv, block_size=block)


@pytest.mark.parametrize(
    ("weights", "kv", "block"),
    [("fp32", "fp32", 32), ("fp16", "int8", 32), ("int8", "int8", 32), ("int4", "int8", 64), ("int4", "fp32", 32)],
)
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

"""Which weight gets which precision, and that graphs of mixed precisions compute what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

import edge
from edge import contract
from edge.contract import DecoderFacts
from edge.embeddings import Embeddings
from edge.errors import BundleError, UsageError
from export import calibrate
from export.api import export_checkpoint
from export.checkpoint import open_checkpoint
from export.plan import make_plan
from export.tensor_names import DECODER_MAPS, EMBEDDING
from export.turns import Clip

FACTS = DecoderFacts(3, 64, 96, 4, 2, 16, 320, 1e-6, 1e6, (2, 3, 3), True)


def clips(turns: int = 5) -> list[Clip]:
    rng = np.random.default_rng(0)
    return [Clip("noise", [rng.integers(0, 256, (84, 84, 3)).astype(np.uint8) for _ in range(turns)], {0: "What?"})]


def test_quantised_weights_bring_an_8_bit_head_table_and_tower() -> None:
    plan = make_plan("int4", facts=FACTS)
    assert (plan.head, plan.embedding, plan.vision, plan.dtype("layers.0.down")) == ("int8", "int8", "int8", "int4")
    plain = make_plan("fp16", facts=FACTS, embedding="int8")
    assert (plain.head, plain.embedding, plain.vision) == ("fp16", "int8", "fp16") and plain.rounded
    assert not plain.quantized


def test_a_layer_or_a_single_map_or_the_head_can_differ() -> None:
    plan = make_plan("int4", facts=FACTS, layers={"layers.1": "int8", "layers.2.down": "fp16", "head": "fp16"})
    assert {plan.precision(f"layers.1.{part}") for part in ("qkv", "attention_output", "gate_up", "down")} == {"int8"}
    assert plan.dtype("layers.2.down") == "float16" and plan.dtype("layers.2.qkv") == "int4" and plan.head == "fp16"
    assert len(plan.overrides) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "int3"}, "int3"),
        ({"block": 48}, "48"),
        ({"layers": {"layers.3": "int8"}}, "layers.3"),
        ({"layers": {"layers.0.up": "int8"}}, "layers.0.up"),
        ({"layers": {"head": "int4"}}, "head"),
        ({"vision": "int4"}, "int4"),
        ({"method": "awq"}, "awq"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_plan(**{"weights": "int4", "facts": FACTS, **options})


def test_gptq_without_turns_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="needs turns to calibrate on"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4", method="gptq")


@pytest.mark.parametrize("tied", [True, False])
def test_a_bundle_of_mixed_precisions_opens_passes_parity_and_says_what_differs(tmp_path: Path, tied: bool) -> None:
    write_checkpoint(tmp_path / "checkpoint", layers=3, tied=tied)
    chosen = {"layers.0": "int8", "layers.1.down": "fp16", "layers.2.gate_up": "fp32", "head": "fp16"}
    manifest = export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "bundle", weights="int4", layers=chosen, vision="fp16", block_size=16
    )
    assert manifest.parity["passed"] and manifest.parity["rounded_relative_error"] <= 1e-4
    named = {one.name: one.weights for one in manifest.precision.overrides}
    assert named["layers.0.qkv"] == "int8" and named["layers.1.down"] == "fp16" and len(named) == 6
    assert (manifest.vision.weights, manifest.precision.head, manifest.embedding.dtype) == ("fp16", "fp16", "int8")
    bundle = edge.open_bundle(tmp_path / "bundle")
    assert bundle.manifest == manifest
    session = edge.StreamSession(bundle)
    session.ask("What?")
    assert np.isfinite(session.push(clips()[0].frames[0], 0).logits).all()


def test_an_int8_table_gives_rows_within_half_a_step_of_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", heads=8)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", embedding="int8")
    table = manifest.embedding
    assert (table.dtype, table.block_size) == ("int8", 128) and table.file_bytes == manifest.files[table.file].bytes
    assert manifest.decoder.weights == "fp32" and manifest.parity["passed"]
    expected = open_checkpoint(tmp_path / "checkpoint").read(EMBEDDING)
    found = Embeddings(table, tmp_path / "bundle" / table.file).rows(range(table.rows))
    steps = np.abs(expected.reshape(len(expected), -1, 128)).max(axis=2) / 127
    assert (np.abs(found - expected).reshape(len(expected), -1, 128) <= 0.5001 * steps[..., None]).all()


def test_a_table_whose_scales_do_not_fit_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", weights="int8")
    path = tmp_path / "bundle" / contract.MANIFEST_FILE
    for change in ({"block_size": 0}, {"block_size": 48}, {"scales_offset": 4}):
        document = json.loads(path.read_text())
        document["embedding"].update(change)
        document[contract.CHECKSUM] = contract.checksum_of(document)
        (tmp_path / "other").mkdir(exist_ok=True)
        for file in path.parent.iterdir():
            if file != path:
                (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "other" / contract.MANIFEST_FILE).write_text(json.dumps(document))
        with pytest.raises(BundleError, match="int8 embedding table"):
            edge.open_bundle(tmp_path / "other")


def test_a_calibrated_bundle_says_what_it_was_fitted_to_and_is_the_same_twice(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    made = [
        export_checkpoint(tmp_path / "checkpoint", tmp_path / name, weights="int4", clips=clips(), block_size=16)
        for name in ("one", "two")
    ]
    precision = made[0].precision
    assert precision.method == "gptq" and precision.calibration["clips"] == ["noise"]
    assert (precision.calibration["turns"], precision.calibration["held_out_turns"]) == (4, 1)
    assert set(precision.output_errors) == {f"layers.{i}.{part}" for i in range(2) for part in DECODER_MAPS}
    assert len(made[0].kv_layers) == 2 and made[0].parity["passed"]
    assert made[0].parity["rounded_relative_error"] <= 1e-4
    names = [path.name for path in (tmp_path / "one").iterdir()]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_map_that_int4_would_spoil_gets_8_bits_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "PROMOTED_ABOVE", 0.0)
    write_checkpoint(tmp_path / "checkpoint")
    chosen = {"layers.0.down": "int4"}
    manifest = export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "bundle", weights="int4", clips=clips(), layers=chosen, block_size=16
    )
    kinds = {one.name: (one.weights, one.reason) for one in manifest.precision.overrides}
    assert kinds["layers.0.down"] == ("int4", "chosen by the user")
    assert kinds["layers.1.down"][0] == "int8" and "in int4 its outputs" in kinds["layers.1.down"][1]
    assert manifest.parity["passed"]


def test_with_rounding_to_nearest_the_caches_are_measured_all_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    manifest = export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "bundle", weights="int8", method="nearest", clips=clips(), block_size=16
    )
    assert manifest.precision.method == "nearest" and len(manifest.kv_layers) == 2
    assert max(manifest.precision.output_errors.values()) < 0.05

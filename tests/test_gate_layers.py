"""Parity in a slice of layers, for models that are too large to be run whole again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import needs_kernels
from test_gate_wrong_weights import Sound, transposed, without_a_bias
from test_gate_wrong_weights import sound as sound
from tiny_checkpoint import write_checkpoint

from apps.cli.main import main
from edge.errors import ParityError, UsageError
from export import proof
from export import weights as weights_module
from export.api import export_checkpoint, record_reference
from export.layer_parity import layers_to_compare, run_whole
from export.parity import require_parity
from export.proof import Written
from export.source import open_source
from export.turns import Clip


def of_size(layers: int, parameters: int) -> Any:
    """As much of a checkpoint as the choice of layers looks at."""

    class Facts:
        decoder = type("Decoder", (), {"layers": layers})

    return type("Checkpoint", (), {"facts": Facts, "parameters": parameters})


@pytest.mark.parametrize(
    ("layers", "billions", "wanted", "chosen"),
    [
        (36, 3.8, None, None),
        (28, 8.3, None, None),
        (64, 33.5, None, [0, 9, 18, 27, 36, 45, 54, 63]),
        (80, 73.4, None, [0, 11, 23, 34, 45, 56, 68, 79]),
        (80, 73.4, "all", None),
        (28, 8.3, 2, [0, 27]),
        (4, 0.1, 9, [0, 1, 2, 3]),
    ],
)
def test_the_first_and_the_last_layer_and_some_between_are_compared_of_a_very_large_model(
    layers: int, billions: float, wanted: str | int | None, chosen: list[int] | None
) -> None:
    assert layers_to_compare(of_size(layers, int(billions * 1e9)), wanted) == chosen


@pytest.mark.parametrize("wanted", [1, 0, "some"])
def test_fewer_layers_than_two_are_no_choice(wanted: str | int) -> None:
    with pytest.raises(UsageError, match="expected `all` or a number of 2 or more"):
        layers_to_compare(of_size(4, 1), wanted)


def test_the_command_refuses_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", "-o", str(tmp_path / "b"), "--parity-layers", "1"]) == 2
    assert "expected all or a number of 2 or more, found '1'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "checkpoint"
    write_checkpoint(folder, layers=5)
    return folder


def clips() -> list[Clip]:
    rng = np.random.default_rng(5)
    frames = [rng.integers(0, 256, (56, 84, 3)).astype(np.uint8) for _ in range(2)]
    return [Clip("noise", frames, {0: "What now?"}, held_out=True)]


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_slice_of_a_sound_bundle_passes_and_the_report_names_its_layers(
    checkpoint: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.converse.MAX_REPLY_TOKENS", 4)
    whole = export_checkpoint(checkpoint, tmp_path / "whole", weights=weights)
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", weights=weights, clips=clips(), parity_layers=3)
    parity = manifest.parity
    assert manifest.files == whole.files and manifest.stored_turns in whole.files  # the same turns, to the byte
    assert parity["passed"] and "held_out" not in parity
    assert parity["compared_layers"] == [0, 2, 4] and parity["layers"] == 5
    assert set(parity["layer_errors"]) == {"0", "2", "4"}
    assert parity["turns"] == 3 + 2 and parity["appends"] > whole.parity["appends"]  # held-out turns beside the probe
    if weights == "int4":
        assert parity["rounded_relative_error"] < 1e-5
    assert main(["inspect", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert "passed (layers 0, 2, 4 of 5, teacher-forced; held-out clips: 1;" in shown


def test_a_layer_that_is_given_pytorchs_own_states_makes_of_them_what_it_made_there(checkpoint: Path) -> None:
    from export.reference import Reference

    source = open_source(checkpoint)
    reference = Reference(source.checkpoint)
    run = run_whole(reference, source.checkpoint, [source.probe], [1, 4])
    positions = reference.positions(source.probe.ids, source.probe.grids)
    (found,) = reference.layer(1, [(run.inputs[1][0], positions)])
    np.testing.assert_allclose(found, run.outputs[1][0], atol=1e-5 * np.abs(found).max())


def a_head_row(written: Written) -> None:
    """All of the head's bytes."""
    name = "head.weight" if "head.weight" in written.decoder.stored else "embedding"
    place = (written.decoder.stored | dict(written.embedding))[name]
    stored = np.memmap(written.folder / place.file, np.uint8, "r+", place.offset, (place.length,))
    stored[:] = np.roll(stored, len(stored) // 2)


def wrong_tower(written: Written) -> None:
    place = next(p for name, p in written.vision.stored.items() if name == "blocks.1.qkv.weight")
    np.memmap(written.folder / place.file, np.uint8, "r+", place.offset, (place.length,))[:] = 0


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("damage", "figure"),
    [
        (transposed, "layer_error_max"),
        (without_a_bias, "layer_error_max"),
        (a_head_row, "logit_cosine_min"),
        (wrong_tower, "vision_relative_error"),
    ],
)
def test_a_wrong_weight_in_a_compared_layer_fails(
    sound: Sound, tmp_path: Path, damage: Callable[[Written], None], figure: str, weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    written = sound.copy(weights, tmp_path / "bundle")
    damage(written)
    monkeypatch.setattr(proof, "_problems", lambda written: [])
    parity = proof.prove(written, sound.probe, None, layers=[0, 1, 2])
    with pytest.raises(ParityError, match=r"graphs differ from transformers.* Layers that differ most: \d \("):
        require_parity(parity)
    limit = parity["thresholds"][figure]
    assert parity[figure] < limit if figure.endswith("min") else parity[figure] > limit


def test_a_wrong_weight_elsewhere_is_still_found_in_the_files(sound: Sound, tmp_path: Path) -> None:
    written = sound.copy("int4", tmp_path / "bundle")
    transposed(written)  # in layer 1
    parity = proof.prove(written, sound.probe, None, layers=[0, 2])
    with pytest.raises(ParityError, match=r"layers\.1\.self_attn\.o_proj"):
        require_parity(parity)


@needs_kernels
def test_an_int8_cache_that_keys_with_a_huge_bias_spoil_fails_in_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "checkpoint", key_bias_norm=605, heads=4, kv_heads=2, head_dim=32)
    choices: dict[str, Any] = {"weights": "int4", "kv": "int8", "parity_layers": 2}
    ours = export_checkpoint(tmp_path / "checkpoint", tmp_path / "ours", **choices).parity["native"]
    assert ours["int8_kv_layer_error"] < ours["thresholds"]["int8_kv_layer_error"] / 3
    monkeypatch.setattr(weights_module, "key_offset", lambda *_: None)
    with pytest.raises(ParityError, match=r"native graphs differ .* int8_kv_layer_error"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "naive", **choices)


def test_a_recorded_reference_has_no_single_layers(checkpoint: Path, tmp_path: Path) -> None:
    record_reference(checkpoint, tmp_path / "reference.npz")
    with pytest.raises(UsageError, match="no hidden states of single layers"):
        export_checkpoint(checkpoint, tmp_path / "b", reference=tmp_path / "reference.npz", parity_layers=2)


def test_limits_for_answers_need_all_layers(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which 2 of the layers do not give"):
        export_checkpoint(checkpoint, tmp_path / "b", gate={"kl_mean": 0}, parity_layers=2)
    assert not list(tmp_path.iterdir())

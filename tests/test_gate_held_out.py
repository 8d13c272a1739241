"""The gate on held-out turns: its figures, its limits, and what a failed one says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import VOCABULARY, write_checkpoint

import export.converse as converse_module
from apps.cli.inspect import print_parity
from apps.cli.main import main
from edge.contract import TokenIds
from edge.errors import ParityError, UsageError
from export.api import _converse, export_checkpoint, record_reference
from export.diagnosis import RaisedCheckpoint, layer_of
from export.expected import IN_NUMPY, compute_expected, float_held_out
from export.float_model import FloatModel
from export.held_out import Tally, divergences
from export.limits import DEFAULTS, held_out_limits, keeps, parse_gate
from export.source import open_source
from export.turns import PIECE, TURN, UNASKED, WORD, Clip, Conversation

SILENCE, STANDBY, RESPONSE, IM_END, WORDS = 1, 2, 3, 4, (10, 11, 12)
TOKENS = TokenIds((SILENCE,), (STANDBY,), (RESPONSE,), 5, IM_END, 6)
STATES = {"silence": SILENCE, "standby": STANDBY, "response": RESPONSE}


def talk(states: str, first_held_out: int = 0) -> Conversation:
    """A conversation with one letter a turn: s, b, or r followed by two words and the end."""
    found = Conversation([], [], 5, 2, name="clip", first_held_out=first_held_out)
    for turn, letter in enumerate(states):
        steps = [(UNASKED, -1)] if letter == "." else [(TURN, {"s": SILENCE, "b": STANDBY, "r": RESPONSE}[letter])]
        if letter == "r":
            steps += [(WORD, WORDS[0]), (WORD, WORDS[1]), (WORD, IM_END)]
        for role, decided in steps:
            found.parts.append(np.array([0]))
            found.roles.append(role)
            found.turns.append(turn)
            found.decided.append(decided)
    return found


def logits(conversation: Conversation, changes: dict[int, int] | None = None) -> np.ndarray:
    """Logits that decide as the conversation does, but for the parts in `changes`; of the parts that are read."""
    rows = np.zeros((len(conversation.parts), 16), np.float32)
    for part, token in enumerate(conversation.decided):
        rows[part, (changes or {}).get(part, max(token, 0))] = 5
    return rows[conversation.held_out_parts]


def figures(conversation: Conversation, changes: dict[int, int]) -> dict[str, Any]:
    tally = Tally(TOKENS)
    tally.add(conversation, logits(conversation), logits(conversation, changes))
    return tally.figures()


def test_the_same_decisions_give_no_flips_and_no_divergence() -> None:
    found = figures(talk(".ssbrs"), {})
    assert found["kl_mean"] == found["state_flip_rate"] == found["changed_word_rate"] == found["response_shift_s"] == 0
    assert found["top1_agreement"] == 1 and found["compared_turns"] == 5 and found["compared_words"] == 3


def test_flips_are_told_by_state() -> None:
    found = figures(talk("sssbr"), {0: RESPONSE, 1: STANDBY, 3: SILENCE})
    assert found["state_flips"] == {"silence > response": 1, "silence > standby": 1, "standby > silence": 1}
    assert found["state_flip_rate"] == pytest.approx(0.6) and found["responses_extra"] == 1


def test_a_response_that_comes_later_is_a_shift_and_not_a_loss() -> None:
    found = figures(talk("rssss"), {0: SILENCE, 6: RESPONSE})  # parts 1, 2 and 3 are the response's words
    assert (found["response_shift_s"], found["responses_missed"], found["responses_extra"]) == (3.0, 0, 0)
    far = figures(talk("rsssssssss"), {0: SILENCE, 12: RESPONSE})
    assert (far["response_shift_s"], far["responses_missed"], far["responses_extra"]) == (None, 1, 1)


def test_a_missing_response_shifts_none_of_those_behind_it() -> None:
    found = figures(talk("rssrssr"), {0: SILENCE})
    assert (found["response_shift_s"], found["responses_missed"], found["responses_extra"]) == (0.0, 1, 0)


def test_changed_words_are_counted_by_token_with_the_end_of_a_reply() -> None:
    assert figures(talk("r"), {2: WORDS[2]})["changed_word_rate"] == pytest.approx(1 / 3, rel=1e-3)
    assert figures(talk("r"), {3: WORDS[2]})["changed_word_rate"] == pytest.approx(1 / 3, rel=1e-3)


def test_only_held_out_turns_count() -> None:
    conversation = talk("ssss", first_held_out=2)
    found = figures(conversation, {0: RESPONSE, 1: RESPONSE})
    assert found["compared_turns"] == 2 and found["state_flip_rate"] == 0


def test_states_that_are_spelt_in_pieces_are_compared_along_their_path() -> None:
    tokens = TokenIds((7, 1), (7, 2), (8, 3), 5, IM_END, 6)
    conversation = Conversation([], [np.array([0])] * 2, 5, 2, roles=[TURN, PIECE], turns=[0, 0], decided=[7, 1])
    for changes, flip in (({}, {}), ({1: 2}, {"silence > standby": 1}), ({0: 8}, {"silence > response": 1}),
                          ({1: 9}, {"silence > other": 1})):  # fmt: skip
        tally = Tally(tokens)
        tally.add(conversation, logits(conversation), logits(conversation, changes))
        assert tally.figures()["state_flips"] == flip


def test_logits_that_are_no_numbers_never_pass() -> None:
    tally, conversation = Tally(TOKENS), talk("ss")
    tally.add(conversation, logits(conversation), np.full((2, 16), np.nan, np.float32))
    found = tally.figures()
    assert found["kl_mean"] is None
    json.dumps(found, allow_nan=False)


def test_divergence_is_that_of_scipy_by_hand() -> None:
    one, other = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergences(other, one)[0] == pytest.approx(expected)


# Limits -----------------------------------------------------------------------------------------------------------


def test_limits_can_be_tightened_and_not_loosened() -> None:
    limits = held_out_limits("int4", ("int8",), {"kl_mean": 0.01, "top1_agreement": 0.9})
    assert limits["kl_mean"] == 0.01 and limits["top1_agreement"] == 0.9
    assert limits["state_flip_rate"] == DEFAULTS["int4"]["state_flip_rate"]
    with pytest.raises(UsageError, match=r"kl_mean can only be tightened: at most .* found 5"):
        held_out_limits("int4", None, {"kl_mean": 5})


def test_one_decision_among_a_few_is_no_failure_unless_the_user_says_so() -> None:
    counts = {"state_flip_rate": 11, "changed_word_rate": 1000}
    limits = held_out_limits("int8", None, {}, counts)
    flipped = float(f"{1 / 11:.4g}")
    assert keeps({"state_flip_rate": flipped}, "state_flip_rate", limits["state_flip_rate"])
    assert not keeps({"state_flip_rate": 2 * flipped}, "state_flip_rate", limits["state_flip_rate"])
    assert limits["changed_word_rate"] == DEFAULTS["int8"]["changed_word_rate"]
    assert held_out_limits("int8", None, {"state_flip_rate": 0}, counts)["state_flip_rate"] == 0


def test_a_figure_that_nothing_was_counted_for_keeps_its_limit_unless_no_logit_was_a_number() -> None:
    assert keeps({"kl_mean": 0.1, "response_shift_s": None}, "response_shift_s", 0.5)
    assert not keeps({"kl_mean": None}, "response_shift_s", 0.5) and not keeps({"kl_mean": None}, "kl_mean", 0.5)


def test_the_gate_is_read_from_text_or_a_file(tmp_path: Path) -> None:
    assert parse_gate("kl_mean=0.01,state_flip_rate=0") == {"kl_mean": 0.01, "state_flip_rate": 0.0}
    (tmp_path / "gate.json").write_text('{"changed_word_rate": 0.02}')
    assert parse_gate(str(tmp_path / "gate.json")) == {"changed_word_rate": 0.02}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kl_maen=1", "no figure `kl_maen`"),
        ("kl_mean", "NAME=LIMIT"),
        ("kl_mean=low", "a number of 0 or more, found 'low'"),
        ("kl_mean=nan", "a number of 0 or more"),
        ("kl_mean=-1", "a number of 0 or more"),
        ("absent.json", "cannot be read"),
        ("kl_mean=9", "can only be tightened"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "bundle"), "--gate", text]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_gate_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    for content, said in (("[1]", "an object"), ("{", "not JSON"), ('{"kl_mean": true}', "a number")):
        (tmp_path / "gate.json").write_text(content)
        with pytest.raises(UsageError, match=said):
            parse_gate(str(tmp_path / "gate.json"))


# A whole export ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers; the third one's weights have outliers that 4 bits cannot hold beside the rest."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("held-out") / "checkpoint"
    write_checkpoint(folder, layers=4)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if "layers.2." in name and name.endswith("proj.weight"):
            loud = torch.randint(0, tensor.numel(), (tensor.numel() // 16,), generator=generator)
            tensor.view(-1)[loud] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converse_module, "MAX_REPLY_TOKENS", 4)


def clips() -> list[Clip]:
    rng = np.random.default_rng(5)
    frames = [rng.integers(0, 256, (56, 84, 3)).astype(np.uint8) for _ in range(4)]
    return [Clip("noise", frames, {0: "What now?"}, held_out=True)]


def test_the_unquantised_form_passes_and_the_report_is_in_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", clips=clips())
    held_out = manifest.parity["held_out"]
    assert held_out["passed"] and held_out["kl_mean"] < 1e-8 and held_out["compared_turns"] == 4
    assert held_out["clips"] == ["noise"] and held_out["replies"] == "own" and "diagnosis" not in held_out


def test_turns_that_are_only_held_out_calibrate_nothing(checkpoint: Path, tmp_path: Path) -> None:
    plain = export_checkpoint(checkpoint, tmp_path / "plain", weights="int4", allow_mismatch=True)
    judged = export_checkpoint(checkpoint, tmp_path / "judged", weights="int4", clips=clips(), allow_mismatch=True)
    assert judged.files == plain.files and judged.precision == plain.precision
    assert judged.precision.method == "nearest" and not judged.precision.calibration
    assert judged.parity["held_out"]["compared_turns"] == 4 and "held_out" not in plain.parity


def test_held_out_turns_are_judged_with_a_recorded_reference_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = export_checkpoint(checkpoint, tmp_path / "asked", weights="int8", clips=clips(), allow_mismatch=True)
    record_reference(checkpoint, tmp_path / "reference.npz")
    monkeypatch.setattr("export.reference.Reference", lambda *_: pytest.fail("PyTorch was asked"))
    recorded = export_checkpoint(
        checkpoint, tmp_path / "recorded", weights="int8", clips=clips(), reference=tmp_path / "reference.npz",
        allow_mismatch=True,
    )  # fmt: skip
    one, other = asked.parity["held_out"], recorded.parity["held_out"]
    assert one["reference"].startswith("transformers") and other["reference"] == IN_NUMPY
    assert other["kl_mean"] == pytest.approx(one["kl_mean"], rel=0.01)
    assert other["compared_turns"] == one["compared_turns"] == 4


def test_a_model_too_large_to_ask_is_judged_on_a_history_of_silence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converse_module, "FloatModel", lambda checkpoint: FloatModel(checkpoint, keep_bytes=0))
    record_reference(checkpoint, tmp_path / "reference.npz")
    for reference in (None, tmp_path / "reference.npz"):
        manifest = export_checkpoint(
            checkpoint, tmp_path / "bundle", clips=clips(), reference=reference, overwrite=True
        )
        held_out = manifest.parity["held_out"]
        assert held_out["passed"] and held_out["replies"] == "silent"
        assert held_out["compared_turns"] == 4 and held_out["compared_words"] == 0


def test_the_exports_own_arithmetic_decides_as_transformers_does(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    talks = _converse(source, clips(), lambda *_: None)
    (wanted,) = compute_expected(source.checkpoint, source.probe, talks).held_out
    (found,) = float_held_out(source.checkpoint, talks)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_failed_gate_names_the_worst_layer_and_the_cheapest_precision_that_passes(
    checkpoint: Path, tmp_path: Path
) -> None:
    gate = {"kl_mean": 0.02, "state_flip_rate": 0.0}
    with pytest.raises(ParityError, match=r"held-out turns differ .* kl_mean [\d.]+, at most 0.02 expected") as caught:
        export_checkpoint(checkpoint, tmp_path / "bundle", weights="int4", clips=clips(), gate=gate)
    assert "Layers that lose most (error of what they add): 2 (" in caught.value.message
    assert "The cheapest that would pass: " in caught.value.message and not (tmp_path / "bundle").exists()
    allowed = export_checkpoint(
        checkpoint, tmp_path / "bundle", weights="int4", clips=clips(), gate=gate, allow_mismatch=True
    )
    diagnosis = allowed.parity["held_out"]["diagnosis"]
    assert diagnosis["worst_layers"][0][0] == 2 and not diagnosis["weights_alone_pass"]
    assert 2 in diagnosis["cheapest"]["layers"] and diagnosis["cheapest"]["more_bytes"] > 0


def test_an_error_that_is_not_the_weights_is_told_to_be_the_caches(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"kl_mean": 1e-9}
    manifest = export_checkpoint(
        checkpoint, tmp_path / "bundle", kv="int8", clips=clips(), gate=gate, allow_mismatch=True
    )
    diagnosis = manifest.parity["held_out"]["diagnosis"]
    assert diagnosis["weights_alone_pass"] and diagnosis["cheapest"] is None


def test_the_report_is_printed_with_its_verdict(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = {"kl_mean": 0.02}
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
    export_checkpoint(checkpoint, tmp_path / "bundle", weights="int4", clips=clips(), gate=gate, allow_mismatch=True)
    assert main(["inspect", str(tmp_path / "bundle")]) == 0
    out = capsys.readouterr().out
    assert "held-out turns: FAILED (4 turns of 1 clips" in out and "state flip rate" in out
    assert "Layers that lose most" in out and "response shift s" in out


def test_problems_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    print_parity({"passed": True, "problems": ["one thing"], "thresholds": {}}, sys.stdout)
    assert "problem: one thing" in capsys.readouterr().out


def test_raised_layers_are_nearer_to_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    from export import api

    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "prove", lambda written, *_: kept.append(_copied(written, tmp_path)) or {"passed": True})
        export_checkpoint(checkpoint, tmp_path / "bundle", weights="int4")
    written = kept[0]
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    wanted = written.checkpoint.read(name)
    errors = []
    for raised in ({}, {1: "int8"}, {1: "fp16"}):
        found = RaisedCheckpoint.from_rounded(written.rounded(), raised, 32).read(name)
        errors.append(float(np.linalg.norm(found - wanted)))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert layer_of(name) == 1 and layer_of("lm_head.weight") is None
    assert wanted.shape[0] < VOCABULARY


def _copied(written: Any, folder: Path) -> Any:
    from dataclasses import replace

    shutil.copytree(written.folder, folder / "kept")
    return replace(written, folder=folder / "kept")

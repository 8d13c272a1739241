"""Real turns as data: the numpy model is the checkpoint, and its conversation is the runtime's own, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

import export.converse as converse_module
from edge.contract import TokenIds
from edge.preprocess import PreprocessConfig
from export.converse import Spelling, converse
from export.expected import compute_expected
from export.float_model import FloatModel
from export.source import open_source
from export.turns import FILLED, OWN, SILENT, TURN, UNASKED, WORD, Clip, Conversation

QUESTION = "What now?"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("turns")
    write_checkpoint(folder, layers=2)
    return open_source(folder)


def spelling(source: Any) -> Spelling:
    return Spelling(source.tokens, source.tokenizer, PreprocessConfig(min_pixels=784, max_pixels=6272))


def clip(turns: int = 6, held_out: bool | None = None, first: int = 1) -> Clip:
    rng = np.random.default_rng(3)
    frames = [rng.integers(0, 256, (56, 84, 3)).astype(np.uint8) for _ in range(turns)]
    return Clip("noise", frames, {first: QUESTION}, held_out)


def test_the_numpy_model_computes_what_transformers_computes(source: Any) -> None:
    probe, model = source.probe, FloatModel(source.checkpoint)
    expected = compute_expected(source.checkpoint, probe)
    frames = model.vision(probe.frames)
    for found, wanted in zip(frames, expected.frames, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    embeds = probe.embeds(model.embeddings(probe.ids), frames)
    caches, logits, at = model.caches(), [], 0
    for append in _parts(probe, embeds):
        hidden = model.hidden(*append, caches)
        logits.append(model.logits(hidden[-1:])[0])
        at += len(append[0])
    assert at == len(probe.ids)
    np.testing.assert_allclose(np.stack(logits), expected.logits, atol=1e-5 * np.abs(expected.logits).max())


def _parts(probe: Any, embeds: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    positions, starts = probe.positions, [0, *probe.ends[:-1]]
    return [(embeds[a:b], positions[:, a:b]) for a, b in zip(starts, probe.ends, strict=True)]


def test_a_model_that_does_not_fit_is_read_again_and_computes_the_same(source: Any) -> None:
    probe = source.probe
    kept, read = FloatModel(source.checkpoint), FloatModel(source.checkpoint, keep_bytes=0)
    assert kept.fits and not read.fits
    for found, wanted in zip(read.vision(probe.frames), kept.vision(probe.frames), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(read.embeddings(probe.ids), kept.embeddings(probe.ids))


def test_every_reply_is_what_the_model_chooses_after_the_tokens_in_front_of_it(source: Any) -> None:
    (talk,) = converse(source.checkpoint, spelling(source), [clip()])
    assert talk.replies == OWN and len(talk.states) == 6 and talk.states[0] == "silence"
    assert talk.roles[0] == UNASKED and talk.decided[0] == -1
    assert next(role for role, turn in zip(talk.roles, talk.turns, strict=True) if turn == 3) == TURN
    logits = _one_pass(source, talk)
    for row, role, decided in zip(logits, talk.roles, talk.decided, strict=True):
        if role != UNASKED:
            assert row.argmax() == decided
    for i, role in enumerate(talk.roles):  # words are fed one by one, each the one decided before it
        if role == WORD:
            assert talk.parts[i].tolist() == [talk.decided[i - 1]]


def _one_pass(source: Any, talk: Conversation) -> np.ndarray:
    """Logits after each part, by transformers."""
    return compute_expected(source.checkpoint, talk).logits


def test_a_random_model_breaks_the_protocol_and_its_words_stay_in_the_history(source: Any) -> None:
    (talk,) = converse(source.checkpoint, spelling(source), [clip(turns=2)])
    first_words = [part for part, role in zip(talk.parts, talk.roles, strict=True) if role == WORD]
    assert talk.states[1] == "other" and 0 < len(first_words) <= converse_module.MAX_REPLY_TOKENS


def test_the_last_quarter_of_a_clip_is_held_out_unless_the_clip_says_otherwise(source: Any) -> None:
    def cut(held_out: bool | None) -> int:
        (talk,) = converse(source.checkpoint, spelling(source), [clip(turns=4, held_out=held_out, first=9)])
        return talk.first_held_out

    assert (cut(None), cut(True), cut(False)) == (3, 0, 4)
    (talk,) = converse(source.checkpoint, spelling(source), [clip(turns=8)])
    assert talk.calibration_tokens == sum(len(p) for p, t in zip(talk.parts, talk.turns, strict=True) if t < 6)
    assert talk.held_out_parts and all(talk.turns[i] >= 6 for i in talk.held_out_parts)


def test_a_model_too_large_to_ask_turn_by_turn_fills_in_states_and_says_so(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converse_module, "FloatModel", lambda checkpoint: FloatModel(checkpoint, keep_bytes=0))
    (talk,) = converse(source.checkpoint, spelling(source), [clip()])
    tokens: TokenIds = source.tokens
    assert talk.replies == FILLED and len(talk.parts) == 5  # from the first question on
    assert set(talk.roles) == {TURN}
    firsts = {tokens.silence[0], tokens.standby[0], tokens.response[0]}
    assert set(talk.decided) <= firsts
    for before, part in zip(talk.decided, talk.parts[1:], strict=False):
        assert part[0] == before and part[1] == tokens.im_end
    np.testing.assert_array_equal(talk.positions[:, 0], 0)
    assert talk.positions.shape == (3, len(talk.ids))


def test_of_a_model_too_large_to_ask_few_clips_are_looked_at_and_one_that_is_only_held_out(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converse_module, "FloatModel", lambda checkpoint: FloatModel(checkpoint, keep_bytes=0))
    clips = [clip(turns=3, held_out=held_out) for held_out in (True, True, *[None] * 7)]
    talks = converse(source.checkpoint, spelling(source), clips)
    assert [talk.replies for talk in talks] == [FILLED] * converse_module.LARGE_CLIPS + [SILENT]
    assert talks[-1].first_held_out == 0 and set(talks[-1].roles) == {TURN} and not talks[-1].visual


def test_the_same_clips_give_the_same_conversation(source: Any) -> None:
    one, two = (converse(source.checkpoint, spelling(source), [clip()])[0] for _ in range(2))
    np.testing.assert_array_equal(one.ids, two.ids)
    assert one.states == two.states

"""The conversation's text and token ids: byte for byte what Streamo's models are trained with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from qwen_vocabulary import qwen_tokenizer_json

from edge.prompt import STREAMO
from edge.tokenizer import ReplyText, Tokenizer

SYSTEM_PROMPT_SHA256 = "c69894b6f80f930b5878728d17a529a0b4a060928fd398618b33bafca4ff7c95"
IM_START, IM_END, VISION_START, VISION_END, NEWLINE = 151644, 151645, 151652, 151653, 198


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    path.write_text(qwen_tokenizer_json(), encoding="utf-8")
    return Tokenizer(path)


def test_the_system_prompt_is_the_published_one_byte_for_byte() -> None:
    data = STREAMO.system_prompt.encode()
    assert len(data) == 845
    assert hashlib.sha256(data).hexdigest() == SYSTEM_PROMPT_SHA256


def test_the_system_block_has_191_tokens_in_qwens_vocabulary(qwen: Tokenizer) -> None:
    assert len(qwen.encode(STREAMO.system_text())) == 191


def test_the_first_turn_has_the_published_ids(qwen: Tokenizer) -> None:
    before, after = STREAMO.turn_text(0)
    assert qwen.encode(before) == [IM_START, 872, NEWLINE, 27, 15, 82, 12, 16, 82, 397, VISION_START]
    assert qwen.encode(after) == [VISION_END, IM_END, NEWLINE, IM_START, 77091, NEWLINE]


def test_a_question_merges_its_last_character_with_the_newline(qwen: Tokenizer) -> None:
    before, _ = STREAMO.turn_text(0, "What is the man doing?")
    ids = qwen.encode(before)
    assert 5267 in ids
    assert ids[-8:] == [27, 15, 82, 12, 16, 82, 397, VISION_START]


def test_states_are_the_three_added_tokens(qwen: Tokenizer) -> None:
    assert [qwen.encode(state) for state in STREAMO.state_texts()] == [[151665], [151666], [151667]]


def test_without_added_tokens_states_are_spelt_in_pieces_that_share_the_first(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(qwen_tokenizer_json(state_tokens=False), encoding="utf-8")
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("</Silence>") == [522, 27571, 763, 29]
    assert tokenizer.encode("</Standby>") == [522, 48733, 1694, 29]
    assert tokenizer.encode("</Response>") == [522, 2582, 29]


@pytest.mark.parametrize(("t", "overhead_tokens"), [(0, 20), (8, 20), (10, 22), (98, 22), (100, 24), (998, 24)])
def test_a_silent_turn_costs_the_published_number_of_text_tokens(qwen: Tokenizer, t: int, overhead_tokens: int) -> None:
    before, after = STREAMO.turn_text(t)
    silent_reply = qwen.encode("</Silence><|im_end|>\n")
    assert len(qwen.encode(before)) + len(qwen.encode(after)) + len(silent_reply) == overhead_tokens


def test_a_character_spread_over_tokens_appears_when_it_is_whole(qwen: Tokenizer) -> None:
    sentence = " Ein grünes Dreieck 🔺 verläßt den Tisch, 走了."
    ids = qwen.encode(sentence)
    reply = ReplyText(qwen)
    pieces = [reply.push(token_id) for token_id in ids]
    assert "" in pieces, "some token should end inside a character"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + reply.finish() == sentence.lstrip()


def test_bytes_that_never_become_a_character_are_shown_as_replacement(qwen: Tokenizer) -> None:
    first_piece, *rest = qwen.encode("🜁")
    assert rest, "this character should take several tokens"
    reply = ReplyText(qwen)
    assert reply.push(first_piece) == ""
    assert reply.finish() == "\ufffd"

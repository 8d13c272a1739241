"""A turn's order: what is asked of the model, what its tokens mean, what stays in the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import FRAME, reply_ids, scripted_bundle

import edge
from edge.backends.fake import ScriptedBackend
from edge.bundle import Bundle
from edge.clock import FakeClock
from edge.engines.profiles import MOST_RUNS
from edge.errors import FrameError, MemoryBudgetError, QuestionError, UsageError
from edge.policy import POLICIES
from edge.questions import MAX_OPEN_QUESTIONS, MAX_QUESTION_TOKENS
from edge.session import StreamSession
from edge.turn import TurnState


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return scripted_bundle(tmp_path_factory.mktemp("scripted"))


def session_of(bundle: Bundle, replies: list[str], **options: object) -> tuple[StreamSession, ScriptedBackend]:
    backend = ScriptedBackend(bundle.manifest, [reply_ids(bundle, reply) for reply in replies])
    return StreamSession(bundle, backend=backend, clock=FakeClock(), **options), backend  # type: ignore[arg-type]


def test_before_the_first_question_the_model_is_not_asked_but_the_turn_is_kept(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Response> never said"])
    before = session.kv_tokens
    turn = session.push(FRAME, 0)
    assert turn.state is TurnState.SILENCE
    assert turn.logits is None
    assert session.kv_tokens > before
    assert session.kept_turns == 1


def test_silence_and_standby_need_no_decode_step(bundle: Bundle) -> None:
    session, backend = session_of(bundle, ["</Silence>", "</Standby>"])
    session.ask("What happens?")
    calls = len(backend.calls)
    assert session.push(FRAME, 0).state is TurnState.SILENCE
    assert session.push(FRAME, 1).state is TurnState.STANDBY
    assert len(backend.calls) == calls + 2


def test_the_tokens_that_close_a_reply_go_in_front_of_the_next_turn(bundle: Bundle) -> None:
    session, backend = session_of(bundle, ["</Silence>"])
    session.ask("?")
    session.push(FRAME, 0)
    tokens_first = backend.calls[-1].tokens - len("?\n")
    session.push(FRAME, 1)
    assert backend.calls[-1].tokens == tokens_first + len(["</Silence>", "<|im_end|>", "\n"])


def test_a_response_is_given_out_in_pieces_that_join_to_its_text(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Response> Ein grünes Dreieck."], max_reply_tokens=64)
    session.ask("?")
    pieces: list[str] = []
    turn = session.push(FRAME, 0, on_text=pieces.append)
    assert turn.state is TurnState.RESPONSE
    assert turn.text == "".join(pieces) == "Ein grünes Dreieck."
    assert len(pieces) > 5
    assert not turn.truncated


def test_a_long_reply_is_cut_at_the_cap_and_the_stream_goes_on(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Response> " + "word " * 50, "</Silence>"], max_reply_tokens=10)
    session.ask("?")
    turn = session.push(FRAME, 0)
    assert turn.truncated
    assert turn.reply_tokens == 10
    assert session.push(FRAME, 1).state is TurnState.SILENCE


def test_the_cache_holds_every_token_of_the_conversation_once(bundle: Bundle) -> None:
    session, backend = session_of(bundle, ["</Response> Yes", "</Silence>", "</Response> No"])
    session.ask("?")
    for t in range(3):
        session.push(FRAME, t)
    assert all(
        later.cache_length == earlier.cache_length + earlier.tokens
        for earlier, later in zip(backend.calls, backend.calls[1:], strict=False)
    )


def test_states_spelt_in_pieces_are_read_piece_by_piece(tmp_path: Path) -> None:
    bundle = scripted_bundle(tmp_path, state_pieces=True)
    byte_ids = {character: i for i, character in enumerate(sorted(_alphabet()))}
    spell = lambda text: [byte_ids[c] for c in text.replace(" ", "Ġ")]  # noqa: E731
    backend = ScriptedBackend(bundle.manifest, [spell("</Standby>"), spell("</Response> Hi")])
    session = StreamSession(bundle, backend=backend, clock=FakeClock())
    session.ask("?")
    assert session.push(FRAME, 0).state is TurnState.STANDBY
    turn = session.push(FRAME, 1)
    assert (turn.state, turn.text) == (TurnState.RESPONSE, "Hi")


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def test_a_first_token_that_is_no_state_is_kept_and_marked(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["Hello"])
    session.ask("?")
    turn = session.push(FRAME, 0)
    assert turn.off_protocol
    assert turn.text == "Hello"


def test_two_questions_before_a_turn_join_it_in_order(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    session.ask("First?")
    session.ask("Second?")
    assert session.push(FRAME, 0).question == "First?\nSecond?"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_window_drops_the_oldest_turn_and_attaches_its_question_to_the_first_kept(
    bundle: Bundle, policy: str
) -> None:
    session, backend = session_of(bundle, ["</Silence>"], window_turns=3, policy=policy)
    session.ask("Stay?")
    evicted, kv_tokens = [], []
    for t in range(5):
        evicted.append(session.push(FRAME, t).evicted_turns)
        kv_tokens.append(session.kv_tokens)
    assert evicted == [0, 0, 0, 1, 1]
    assert session.kept_turns == 3
    assert kv_tokens[2:] == [kv_tokens[2]] * 3, "the question is still there, once"
    assert backend.encoded_frames == 5, "no frame is encoded twice"
    assert session.kv_tokens == backend.calls[-1].cache_length + backend.calls[-1].tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_positions_stay_where_they_are_once_the_window_is_full(bundle: Bundle, policy: str) -> None:
    session, _ = session_of(bundle, ["</Silence>"], window_turns=3, policy=policy)
    session.ask("?")
    for t in range(10, 13):
        session.push(FRAME, t)
    full = session.position
    for t in range(13, 40):
        session.push(FRAME, t)
    assert session.position == full


def test_while_nobody_asks_rebuilding_costs_nothing_and_the_first_question_sees_the_whole_window(
    bundle: Bundle,
) -> None:
    session, backend = session_of(bundle, ["</Silence>"], window_turns=3, policy="rebuild")
    for t in range(3):
        session.push(FRAME, t)
    calls = len(backend.calls)
    for t in range(3, 30):
        assert session.push(FRAME, t).evicted_turns == 1
    assert len(backend.calls) == calls, "no token is computed that nobody reads"
    session.ask("What do you see?")
    turn = session.push(FRAME, 30)
    assert turn.logits is not None
    asked, _ = session_of(bundle, ["</Silence>"], window_turns=3)
    for t in range(28, 30):
        asked.push(FRAME, t)
    asked.ask("What do you see?")
    asked.push(FRAME, 30)
    assert (session.kv_tokens, session.position) == (asked.kv_tokens, asked.position)


def test_a_window_keeps_all_its_turns_while_replies_are_of_ordinary_length(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Response> " + "w" * 12], window_turns=40)
    session.ask("?")
    assert not any(session.push(FRAME, t).evicted_turns for t in range(40))


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_allocated_once(bundle: Bundle, policy: str) -> None:
    session, backend = session_of(bundle, ["</Response> x", "</Silence>"], window_turns=3, policy=policy)
    capacity = backend.capacity_tokens
    session.ask("?")
    for t in range(50):
        session.push(FRAME, t)
    assert backend.capacity_tokens == session.kv_capacity_tokens == capacity
    assert session.kv_tokens <= capacity


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_an_empty_question_is_refused(bundle: Bundle, question: str) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    with pytest.raises(QuestionError, match="empty"):
        session.ask(question)


def test_a_question_longer_than_the_window_allows_is_refused_with_both_numbers(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    with pytest.raises(QuestionError, match=f"at most {MAX_QUESTION_TOKENS} tokens.* found {MAX_QUESTION_TOKENS + 1}"):
        session.ask("x" * (MAX_QUESTION_TOKENS + 1))


@pytest.mark.parametrize("policy", POLICIES)
def test_open_questions_never_outgrow_their_room(bundle: Bundle, policy: str) -> None:
    session, _ = session_of(bundle, ["</Silence>"], window_turns=2, policy=policy)
    for t in range(20):
        session.ask("x" * 300)
        session.push(FRAME, t)
    assert session.kv_tokens <= session.kv_capacity_tokens


def test_so_many_questions_are_open_as_an_engine_has_room_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run_decoder = ScriptedBackend.run_decoder

    def counting(self: ScriptedBackend, embeds: np.ndarray, cos: np.ndarray, sin: np.ndarray, view: Any) -> Any:
        runs.append(len(view.run_cos))
        return run_decoder(self, embeds, cos, sin, view)

    monkeypatch.setattr(ScriptedBackend, "run_decoder", counting)
    session, _ = session_of(bundle, ["</Silence>"], window_turns=3)
    for t in range(60):
        session.ask(f"{t}?")
        session.push(FRAME, t)
    assert len(session.open_questions) == MAX_OPEN_QUESTIONS
    assert list(session.open_questions.values())[-1] == "59?"
    assert MAX_OPEN_QUESTIONS - 2 <= max(runs) <= MOST_RUNS


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        ([[0]], "list"),
        (np.zeros((28, 28, 3), np.float32), "float32"),
        (np.zeros((28, 28), np.uint8), r"\(28, 28\)"),
        (np.zeros((28, 28, 4), np.uint8), r"\(28, 28, 4\)"),
        (np.zeros((0, 28, 3), np.uint8), r"\(0, 28, 3\)"),
        (np.zeros((1, 1000, 3), np.uint8), "1000x1"),
        (np.zeros((10, 1400, 3), np.uint8), "1400x10 would become 11 visual tokens, at most 1"),
    ],
)
def test_a_frame_that_is_not_uint8_rgb_is_refused_and_nothing_is_lost(
    bundle: Bundle, frame: object, found: str
) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    session.ask("Still here?")
    with pytest.raises(FrameError, match=found):
        session.push(frame, 0)  # type: ignore[arg-type]
    assert session.push(FRAME, 0).question == "Still here?"


def test_time_must_advance(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    session.push(FRAME, 3)
    with pytest.raises(UsageError, match="3 after 3"):
        session.push(FRAME, 3)


@pytest.mark.parametrize("t", [1.5, "3", None])
def test_a_stream_second_is_a_whole_number(bundle: Bundle, t: object) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    with pytest.raises(UsageError, match="whole number"):
        session.push(FRAME, t)  # type: ignore[arg-type]


def test_a_listener_that_fails_does_not_tear_the_conversation(bundle: Bundle) -> None:
    def fail(piece: str) -> None:
        raise RuntimeError(piece)

    session, backend = session_of(bundle, ["</Response> Yes", "</Silence>"])
    session.ask("?")
    with pytest.raises(RuntimeError):
        session.push(FRAME, 0, on_text=fail)
    steps = [call.tokens for call in backend.calls].count(1)
    assert steps >= 1, "a piece was said"
    assert session.push(FRAME, 1).state is TurnState.SILENCE
    assert backend.calls[-1].cache_length == backend.calls[-2].cache_length + backend.calls[-2].tokens


def test_a_question_may_hold_any_character(bundle: Bundle) -> None:
    session, backend = session_of(bundle, ["</Silence>"])
    session.ask("a\0b {image} {tag}?")
    session.push(FRAME, 0)
    plain, other = session_of(bundle, ["</Silence>"])
    plain.ask("x" * len("a\0b {image} {tag}?"))
    plain.push(FRAME, 0)
    assert backend.calls[-1] == other.calls[-1]


def test_a_reset_session_starts_from_the_system_prompt(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    start = (session.kv_tokens, session.position)
    session.ask("?")
    session.push(FRAME, 0)
    session.reset()
    assert (session.kv_tokens, session.position) == start
    assert session.push(FRAME, 0).logits is None


@pytest.mark.parametrize("option", [{"policy": "slid"}, {"backend": "abacus"}, {"window_turns": 0}])
def test_an_option_that_makes_no_sense_is_refused(bundle: Bundle, option: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        edge.StreamSession(bundle, **option)  # type: ignore[arg-type]


def test_a_backend_that_cannot_evict_in_place_rebuilds_unless_sliding_was_asked_for(bundle: Bundle) -> None:
    backend = ScriptedBackend(bundle.manifest, [reply_ids(bundle, "</Silence>")])
    assert StreamSession(bundle, backend=backend).policy == "slide"
    backend.evicts_in_place = False
    assert StreamSession(bundle, backend=backend).policy == "rebuild"
    with pytest.raises(UsageError, match="evicts in place") as caught:
        StreamSession(bundle, backend=backend, policy="slide")
    assert "--policy rebuild" in (caught.value.hint or "")


@pytest.mark.parametrize("by", ["number", "text"])
def test_a_closed_question_is_no_longer_open_and_with_none_open_the_model_is_not_asked(bundle: Bundle, by: str) -> None:
    session, _ = session_of(bundle, ["</Response> Yes"])
    first, second = session.ask("First?"), session.ask(" Second? ")
    assert session.push(FRAME, 0).text == "Yes"
    assert session.open_questions == {first: "First?", second: "Second?"}
    assert session.close_question(first if by == "number" else "First? ") == "First?"
    assert session.push(FRAME, 1).text == "Yes"
    session.close_question("Second?")
    assert session.open_questions == {}
    turn = session.push(FRAME, 2)
    assert (turn.logits, turn.state) == (None, TurnState.SILENCE)
    assert session.ask("Third?") not in (first, second)
    assert session.push(FRAME, 3).text == "Yes"


def test_a_question_closed_before_its_turn_never_joins_one(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    session.close_question(session.ask("Never mind?"))
    assert session.push(FRAME, 0).question == ""


def test_closing_what_is_not_open_names_what_is(bundle: Bundle) -> None:
    session, _ = session_of(bundle, ["</Silence>"])
    session.ask("What happens?")
    with pytest.raises(QuestionError, match="`What happen` is open") as caught:
        session.close_question("What happen")
    assert caught.value.hint == "Open are 1: What happens?"
    with pytest.raises(QuestionError, match="number 7"):
        session.close_question(7)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_closed_question_leaves_with_its_turn_or_at_once_if_that_has_left(bundle: Bundle, policy: str) -> None:
    session, _ = session_of(bundle, ["</Silence>"], window_turns=3, policy=policy)
    session.ask("y")
    session.push(FRAME, 0)
    question = session.ask("x" * 50)
    kv_tokens = []
    for t in range(1, 8):
        if t == 6:
            session.close_question(question)  # its turn left at t = 4
        session.push(FRAME, t)
        kv_tokens.append(session.kv_tokens)
    assert kv_tokens[5] == kv_tokens[4] - len("x" * 50 + "\n")
    session.reset()
    question = session.ask("x" * 50)
    session.ask("y")
    session.push(FRAME, 0)
    session.close_question(question)
    kv_tokens = []
    for t in range(1, 5):
        session.push(FRAME, t)
        kv_tokens.append(session.kv_tokens)
    assert kv_tokens[2] == kv_tokens[1] - len("x" * 50 + "\n"), "it left with turn 0"


def test_sliding_serves_every_turn_at_the_same_cost_asked_or_not(bundle: Bundle) -> None:
    session, backend = session_of(bundle, ["</Silence>"], window_turns=3, policy="slide")
    for t in range(10, 20):
        session.push(FRAME, t)
    assert len({call.tokens for call in backend.calls[3:]}) == 1
    session.ask("?")
    session.push(FRAME, 20)
    assert backend.calls[-1].tokens == backend.calls[-2].tokens + len("?\n")


def test_sliding_keeps_no_frames_beside_the_cache(bundle: Bundle) -> None:
    from edge.capacity import plan_for_bundle

    slide, rebuild = (plan_for_bundle(bundle, policy=policy) for policy in ("slide", "rebuild"))
    assert slide.total_bytes == slide.kv_bytes == rebuild.kv_bytes
    assert rebuild.total_bytes == rebuild.kv_bytes + (rebuild.window_turns + 1) * rebuild.frame_bytes


def test_memory_that_the_backend_cannot_get_is_told_with_both_numbers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ScriptedBackend, capacity_tokens: int) -> None:
        raise MemoryError

    monkeypatch.setattr(ScriptedBackend, "allocate_cache", fail)
    with pytest.raises(MemoryBudgetError, match=r"4 turns needs .* GB is free") as caught:
        session_of(bundle, ["</Silence>"])
    assert "--window 3" in (caught.value.hint or "")

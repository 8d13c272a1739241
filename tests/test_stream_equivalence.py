"""The session against transformers: same ids, and the same logits at every turn, before and after the window slides."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from kernel_cases import relative_error
from reference_stream import ReferenceModel, messages_of

import edge
from apps.demo import CHECKPOINT
from apps.demo.world import make_stream
from edge.backends import evicts_in_place
from edge.bundle import Bundle
from edge.prompt import STREAMO
from edge.session import StreamSession
from edge.tokenizer import Tokenizer
from edge.turn import Turn, TurnState

RELATIVE_TOLERANCE = 1e-4
QUESTIONS = {0: "Describe each event when it ends.", 7: "Is the light on?", 23: "How many shapes are visible?"}


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel.load(CHECKPOINT)


def play(session: StreamSession, frames: list[np.ndarray], first_t: int = 0) -> list[Turn]:
    turns = []
    for index, frame in enumerate(frames):
        if index in QUESTIONS:
            session.ask(QUESTIONS[index])
        turns.append(session.push(frame, first_t + index))
    return turns


@pytest.mark.parametrize("first_t", [0, 95, 9990])
def test_appending_turn_by_turn_gives_the_logits_of_one_full_prefill(
    demo_bundle: Bundle, reference: ReferenceModel, first_t: int
) -> None:
    stream = make_stream(50_001)
    count = 40 if first_t == 0 else 14
    frames = [stream.render(float(t % stream.duration_s)) for t in range(count)]
    turns = play(edge.StreamSession(demo_bundle, max_reply_tokens=24), frames, first_t)
    expected = reference.logits_at_turns(messages_of(turns, [turn.question for turn in turns]), frames)
    assert len(expected) == len(turns)
    errors = [relative_error(t.logits, e) for t, e in zip(turns, expected, strict=True) if t.logits is not None]
    assert len(errors) == count
    assert max(errors) <= RELATIVE_TOLERANCE


def test_after_the_window_slid_the_logits_are_those_of_the_kept_turns_alone(
    demo_bundle: Bundle, reference: ReferenceModel
) -> None:
    window = 9
    stream = make_stream(50_002)
    frames = [stream.render(float(t)) for t in range(16)]
    session = edge.StreamSession(demo_bundle, policy="rebuild", window_turns=window, max_reply_tokens=24)
    turns = play(session, frames)
    for last in (9, 12, 15):
        kept = turns[last + 1 - window : last + 1]
        questions = [turn.question for turn in kept]
        questions[0] = "\n".join(text for t, text in QUESTIONS.items() if t <= kept[0].t)
        expected = reference.logits_at_turns(messages_of(kept, questions), frames[last + 1 - window : last + 1])[-1]
        logits = turns[last].logits
        assert logits is not None
        assert turns[last].evicted_turns == 1
        assert relative_error(logits, expected) <= RELATIVE_TOLERANCE


def test_sliding_gives_the_logits_of_rebuilding_until_the_first_turn_leaves(demo_bundle: Bundle) -> None:
    if not evicts_in_place("cpu", demo_bundle):
        pytest.skip("the native kernels are not built")
    stream = make_stream(50_003)
    frames = [stream.render(float(t)) for t in range(14)]
    slid, rebuilt = (
        play(edge.StreamSession(demo_bundle, policy=policy, window_turns=10, max_reply_tokens=24), frames)
        for policy in ("slide", "rebuild")
    )
    for slide, rebuild in zip(slid[:10], rebuilt, strict=False):
        assert (slide.state, slide.text) == (rebuild.state, rebuild.text)
        assert relative_error(slide.logits, rebuild.logits) <= RELATIVE_TOLERANCE
    assert [turn.evicted_turns for turn in slid] == [turn.evicted_turns for turn in rebuilt] == [0] * 10 + [1] * 4


@pytest.mark.parametrize("first_t", [0, 8, 97, 1234])
def test_ids_of_a_whole_conversation_equal_the_chat_template_and_tokenizer(
    reference: ReferenceModel, first_t: int
) -> None:
    states = [TurnState.SILENCE, TurnState.STANDBY, TurnState.RESPONSE, TurnState.SILENCE, TurnState.RESPONSE]
    texts = ["", "", "The red circle was put on the table.", "", "There are 2 shapes."]
    turns = [Turn(first_t + i, state, text) for i, (state, text) in enumerate(zip(states, texts, strict=True))]
    questions = ["", "What happens?", "", "How many shapes\nare visible?", ""]
    tokenizer = Tokenizer(CHECKPOINT / "tokenizer.json")
    ids = tokenizer.encode(STREAMO.system_text())
    for index, (turn, question) in enumerate(zip(turns, questions, strict=True)):
        before, after = STREAMO.turn_text(turn.t, question)
        ids += [*tokenizer.encode(before), *tokenizer.encode("<|image_pad|>"), *tokenizer.encode(after)]
        if index < len(turns) - 1:
            state = STREAMO.state_texts()[list(TurnState).index(turn.state)]
            reply = f"{state} {turn.text}" if turn.text else state
            ids += tokenizer.encode(f"{reply}<|im_end|>\n")
    assert ids == reference.prompt_ids(messages_of(turns, questions))

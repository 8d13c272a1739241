"""The runtime says what Streamo's own loop says when transformers is sent everything again each second."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from apps.demo import CHECKPOINT
from apps.demo.official_loop import OfficialLoop
from apps.demo.world import Stream, make_stream
from edge.bundle import Bundle
from edge.session import StreamSession
from edge.turn import Turn

FIRST_SEED = 70_000
STREAMS = 20
RELATIVE_TOLERANCE = 1e-4


def play_both(session: StreamSession, official: OfficialLoop, stream: Stream) -> list[Turn]:
    """Both on the same stream; states, texts and logits must agree at every turn."""
    session.reset()
    official.reset()
    turns = []
    for t in range(stream.duration_s):
        frame, question = stream.render(float(t)), stream.questions.get(t)
        if question:
            session.ask(question)
        turn = session.push(frame, t)
        state, text, logits = official.push(frame, t, question)
        assert (turn.state.value, turn.text) == (state, text), f"at {t} s"
        if turn.logits is not None:
            assert logits is not None
            assert np.abs(turn.logits - logits).max() <= RELATIVE_TOLERANCE * np.abs(logits).max(), f"at {t} s"
        turns.append(turn)
    return turns


@pytest.fixture(scope="module")
def session(demo_bundle: Bundle) -> StreamSession:
    return StreamSession(demo_bundle)


@pytest.fixture(scope="module")
def official() -> OfficialLoop:
    return OfficialLoop(CHECKPOINT)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + STREAMS))
def test_states_texts_and_logits_are_those_of_the_official_loop(
    session: StreamSession, official: OfficialLoop, seed: int
) -> None:
    turns = play_both(session, official, make_stream(seed, duration_s=20))
    assert any(turn.logits is not None for turn in turns)


def test_the_same_holds_while_the_window_slides(demo_bundle: Bundle) -> None:
    window_turns, stream = 12, make_stream(FIRST_SEED + 100, duration_s=26)
    session = StreamSession(demo_bundle, policy="rebuild", window_turns=window_turns)
    turns = play_both(session, OfficialLoop(CHECKPOINT, window_turns=window_turns), stream)
    assert sum(turn.evicted_turns for turn in turns) == stream.duration_s - window_turns

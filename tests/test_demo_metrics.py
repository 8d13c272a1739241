"""The figures by which the demonstration is judged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.demo.evaluate import evaluate, with_other_frames
from apps.demo.labels import Turn
from apps.demo.metrics import Scores, same_text, score_turns
from apps.demo.world import make_stream


def _turns(*texts: str) -> list[Turn]:
    return [Turn("response", text, "x") if text else Turn("silence", "", "x") for text in texts]


def _answers(*texts: str) -> list[tuple[str, str]]:
    return [("response", text) if text else ("silence", "") for text in texts]


def _figures(answers: list[tuple[str, str]], truth: list[Turn]) -> dict:
    scores = Scores()
    scores.add(answers, truth)
    return scores.report()


def test_the_truth_itself_scores_one() -> None:
    report = evaluate(lambda stream: [(turn.state, turn.text) for turn in stream.truth], range(20))
    assert report["response_f1"] == report["state_accuracy"] == report["answer_accuracy"] == 1
    assert report["n_streams"] == 20
    assert set(report["tasks"]) == {"narration", "action_caption", "event_caption", "grounding", "tsqa"}


def test_one_second_off_is_right_and_two_are_wrong() -> None:
    truth = _turns("", "a", "", "", "")
    assert _figures(_answers("", "", "a", "", ""), truth)["response_f1"] == 1
    assert _figures(_answers("", "", "", "a", ""), truth)["response_f1"] == 0


def test_one_answer_serves_one_true_response_only() -> None:
    assert _figures(_answers("", "a", ""), _turns("a", "", "a"))["response_f1"] == pytest.approx(2 / 3)
    assert _figures(_answers("a", "a", "a"), _turns("", "a", ""))["response_f1"] == pytest.approx(0.5)


def test_a_wrong_text_at_the_right_time_lowers_the_answer_accuracy_only_once() -> None:
    report = _figures(_answers("a", "", "x"), _turns("a", "", "b"))
    assert report["answer_accuracy"] == 0.5
    assert report["response_f1"] == 0.5
    assert report["state_accuracy"] == 1


def test_turns_before_the_first_question_do_not_count() -> None:
    tally = score_turns(_answers("noise", "", "a"), _turns("", "", "a"), first_turn=1)["x"]
    assert (tally.turns, tally.said, tally.matched, tally.right_states) == (2, 1, 1, 2)


def test_each_task_gets_the_turns_on_which_it_was_in_force() -> None:
    truth = [Turn("response", "a", "one"), Turn("silence", "", "two"), Turn("response", "b", "two")]
    report = _figures(_answers("a", "", "c"), truth)
    assert report["tasks"]["one"]["response_f1"] == 1
    assert report["tasks"]["two"]["response_f1"] == 0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Given event occurred between 9s to 12s.", True),
        ("Given event occurred between 8s to 13s.", True),
        ("Given event occurred between 7s to 12s.", False),
        ("Given event occurred between 9s to 14s.", False),
        ("Given event occurred between 9s to 12", False),
    ],
)
def test_grounding_times_may_be_off_by_one_second_each(said: str, right: bool) -> None:
    assert same_text(said, "Given event occurred between 9s to 12s.") is right


def test_a_different_number_of_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="3 turns needs as many answers, found 2"):
        score_turns(_answers("", ""), _turns("", "", ""))


def test_the_control_shows_other_pictures_and_keeps_questions_and_truth() -> None:
    stream = make_stream(50_004)
    other = with_other_frames(stream)
    assert other.questions == stream.questions and other.truth == stream.truth
    assert abs(other.render(5.0).astype(int) - stream.render(5.0)).mean() > 5


@given(st.lists(st.sampled_from(["", "a", "b"]), min_size=1, max_size=30), st.integers(0, 2**20))
def test_figures_lie_between_zero_and_one_and_silence_finds_nothing(texts: list[str], seed: int) -> None:
    said = [texts[(i * 7 + seed) % len(texts)] for i in range(len(texts))]
    report = _figures(_answers(*said), _turns(*texts))
    assert all(0 <= report[key] <= 1 for key in ("response_f1", "state_accuracy", "answer_accuracy"))
    if any(texts):
        assert _figures(_answers(*[""] * len(texts)), _turns(*texts))["response_f1"] == 0

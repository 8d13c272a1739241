"""The benchmark of one turn: what it samples, what it reports, and that a turn is far cheaper than re-sending."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from apps.bench import turn as bench
from apps.bench.machine import machine_card
from apps.bench.turn import DEPTHS_TURNS, Samples, silent_stream, summarise, time_ours, time_resend
from edge.bundle import Bundle
from edge.errors import UsageError


class FakeSession:
    """Speaks at the seconds it is told to."""

    def __init__(self, speaks_at: set[int]) -> None:
        self.speaks_at = speaks_at
        self.asked: list[str] = []

    def reset(self) -> None:
        self.asked = []

    def ask(self, text: str) -> None:
        self.asked.append(text)

    def push(self, frame: object, t: int) -> SimpleNamespace:
        return SimpleNamespace(text="Hello." if t in self.speaks_at else "")


class FakeLoop:
    """Remembers the length of its conversation at each question."""

    def __init__(self) -> None:
        self.turns = 0
        self.sent_turns: list[int] = []

    def reset(self) -> None:
        self.turns = 0

    def push(self, frame: object, t: int, question: str | None) -> tuple[str, str, None]:
        assert t == self.turns
        self.turns += 1
        if question:
            self.sent_turns.append(self.turns)
        return "silence", "", None


def test_both_loops_are_timed_at_the_same_depths_and_only_when_silent():
    frames = list(range(120))
    samples, loop = Samples(), FakeLoop()
    time_ours(FakeSession(speaks_at={3, 8, 119}), frames, "What?", samples)
    for depth in DEPTHS_TURNS:
        time_resend(loop, frames, "What?", depth, samples)
    assert loop.sent_turns == [10, 30, 120]
    assert {depth: len(times) for depth, times in samples.ours.items()} == {10: 4, 30: 5, 120: 4}
    assert {depth: len(times) for depth, times in samples.resend.items()} == {10: 1, 30: 1, 120: 1}
    assert samples.spoken_turns == 2


def test_the_report_holds_medians_minima_and_both_ratios():
    samples = Samples()
    samples.ours = {10: [10.0, 11.0, 90.0], 30: [11.0], 120: [12.0, 14.0, 13.0]}
    samples.resend = {10: [100.0], 30: [200.0], 120: [650.0, 600.0, 700.0]}
    report = summarise(samples)
    assert report["ours_ms"] == {"10": 11.0, "30": 11.0, "120": 13.0}
    assert report["ours_min_ms"]["120"] == 12.0
    assert report["resend_ms"]["120"] == 650.0
    assert report["flatness"] == pytest.approx(13 / 11, abs=1e-3)
    assert report["speedup"] == 50.0
    assert report["n_ours"] == {"10": 3, "30": 1, "120": 3}


def test_a_model_that_never_keeps_silent_cannot_be_timed():
    with pytest.raises(UsageError, match="spoke in every turn"):
        summarise(Samples())


def test_the_question_is_about_something_that_never_happens():
    from apps.demo import phrases
    from apps.demo.world import make_stream

    frames, question = silent_stream(20, seed=7)
    stream = make_stream(7, phrases.GROUNDING, duration_s=21)
    assert len(frames) == 20 and frames[0].shape == (stream.height, stream.width, 3)
    happened = {phrases.caption_event(event.kind, event.thing) for event in stream.events}
    assert not [caption for caption in happened if caption in question]


def test_the_card_says_what_was_measured_on_what():
    card = machine_card(threads=2)
    assert card["threads"] == 2 and card["cores"] >= 1 and card["cpu"]
    assert {"numpy", "onnxruntime"} <= set(card["versions"])
    json.dumps(card)


@pytest.mark.slow
def test_the_whole_benchmark_runs_and_its_last_line_has_the_figures(
    demo_bundle: Bundle, capfd: pytest.CaptureFixture[str]
):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from apps.cli.main import main

    code = main(["bench", "turn", "--bundle", str(demo_bundle.path), "--repeats", "1", "--json"])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert set(result["ours_ms"]) == set(result["resend_ms"]) == {str(depth) for depth in bench.DEPTHS_TURNS}
    assert all(1 <= count <= bench.NEIGHBOURS_TURNS for count in result["n_ours"].values())
    assert all(count == 1 for count in result["n_resend"].values())
    times_ms = [*result["ours_ms"].values(), *result["resend_ms"].values()]
    assert all(time_ms > 0 for time_ms in times_ms)
    assert result["speedup"] == pytest.approx(result["resend_ms"]["120"] / result["ours_ms"]["120"], rel=0.01)

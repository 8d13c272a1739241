"""`bench day`: what it computes from a day's turns, and that quality is compared on the same pictures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from apps.bench import day
from apps.bench.day import DayLog, Scene, repeated_scenes
from apps.cli.main import main
from apps.demo.labels import Turn
from edge.errors import UsageError

SAID, SILENT = ("response", "The light goes on."), ("silence", "")


def scene() -> Scene:
    return Scene("what?", [Turn(*SAID), *[Turn(*SILENT)] * (day.SCENE_TURNS - 1)])


def test_the_last_hour_of_a_day_shows_the_first_hours_scenes_again():
    class Drawn(list):
        put = list.append

    drawn = Drawn()
    turns = 5 * day.SCENE_TURNS
    day._draw(turns, 90_000, drawn)
    scenes = [item for item in drawn if isinstance(item, Scene)]
    assert repeated_scenes(5) == 2
    assert [scene.truth for scene in scenes[3:]] == [scene.truth for scene in scenes[:2]]
    assert scenes[2].truth not in (scenes[0].truth, scenes[1].truth)
    pictures = [item for item in drawn if not isinstance(item, Scene)]
    assert len(pictures) == turns
    assert (pictures[7] == pictures[3 * day.SCENE_TURNS + 7]).all()


def test_a_day_of_at_least_two_hours_repeats_one_whole_hour():
    assert repeated_scenes(24) == 12
    assert repeated_scenes(288) == 12


def test_the_ratio_is_of_the_last_thousand_turns_to_those_after_turn_1000(monkeypatch):
    resident = iter([100.0, *[101.5] * 1000])
    monkeypatch.setattr(day, "resident_mib", lambda: next(resident))
    turns = 4 * 900
    log = DayLog(turns)
    for t in range(turns):
        log.add_turn(t, 12.0 if t >= turns - 1000 else 10.0)
        if (t + 1) % day.SCENE_TURNS == 0:
            log.add_scene(scene(), [SAID if t < turns // 2 else SILENT, *[SILENT] * (day.SCENE_TURNS - 1)])
    hour = log.end_hour()
    summary = log.summary()
    assert summary["turn_time_ratio"] == summary["turn_time_ratio_p10"] == 1.2
    assert summary["resident_growth_mib"] == 1.5
    assert summary["response_f1_first"] == 1.0
    assert summary["response_f1_last"] == 0.0
    assert summary["hours"] == [hour]
    assert hour["turns"] == turns


def test_a_day_too_short_to_compare_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 3000 turns"):
        day.measure(
            tmp_path, turns=2999, window_turns=None, policy=None, threads=1, seed=1, progress=print, report=print
        )


def test_each_hour_is_logged_as_soon_as_it_is_over(monkeypatch, tmp_path, capsys):
    log = tmp_path / "day.jsonl"

    def measure(*_, report, **__):
        report({"hour": 0})
        assert json.loads(log.read_text()) == {"hour": 0}
        raise UsageError("stopped")

    monkeypatch.setattr(day, "measure", measure)
    monkeypatch.setattr("apps.cli.bench_day.chosen_bundle", lambda *_: SimpleNamespace())
    assert main(["bench", "day", "--log", str(log)]) == 2
    assert "stopped" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_said_before_the_day_begins(tmp_path, capsys):
    assert main(["bench", "day", "--log", str(tmp_path / "missing" / "day.jsonl")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err

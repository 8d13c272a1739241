"""`--calibration`, `--held-out` and `--questions`: which frames and questions become the clips of an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.cli.calibration import DEFAULT_QUESTIONS, read_clips, read_questions
from apps.cli.main import main
from apps.cli.synthetic import synthetic_source
from apps.demo import CHECKPOINT
from apps.demo.clips import JUDGED_PIXELS, demo_clips, judged_clips
from edge.errors import UsageError
from edge.preprocess import PreprocessConfig, resize_frame
from export.turns import Clip

SCENE = "synthetic:table?seed=3&seconds={}"


def test_a_clip_has_the_frame_of_every_second_and_its_question() -> None:
    (clip,) = read_clips([SCENE.format(30)], [(None, "What?"), (12, "And now?"), (99, "Too late?")])
    assert len(clip.frames) == 30 and clip.questions == {0: "What?", 12: "And now?"}
    source = synthetic_source("table", {"seed": "3", "seconds": "30", "fps": "1"})
    pictures = [frame.pixels for frame in iter(source.read, None)]
    assert (clip.frames[7] == pictures[7]).all() and clip.held_out is None


def test_questions_without_a_time_are_dealt_to_the_clips_and_spread() -> None:
    one, two = read_clips([SCENE.format(24), SCENE.format(30)], [(None, text) for text in ("a", "b", "c")])
    assert one.questions == {0: "a", 12: "c"} and two.questions == {0: "b"}


def test_questions_that_meet_in_one_second_are_all_asked() -> None:
    (clip,) = read_clips([SCENE.format(2)], [(None, "a"), (None, "b"), (None, "c"), (1, "d")])
    assert clip.questions == {0: "a\nb", 1: "c\nd"}


def test_only_the_first_minute_is_read() -> None:
    (clip,) = read_clips([SCENE.format(70)], [(None, "What?")])
    assert len(clip.frames) == 60


def test_a_file_of_questions_may_name_seconds(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("Describe.\n\n12: How many cups?\n 30 :Where? Is it 5: red?\n")
    assert read_questions(str(path)) == [(None, "Describe."), (12, "How many cups?"), (30, "Where? Is it 5: red?")]
    assert read_questions(None) == [(None, text) for text in DEFAULT_QUESTIONS]
    path.write_text("\n")
    with pytest.raises(UsageError, match="hold no line"):
        read_questions(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(str(tmp_path / "none.txt"))


def test_questions_without_clips_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", "x", "-o", str(tmp_path / "b"), "--questions", "q.txt"]) != 0


def test_the_demonstrations_clips_are_calibrated_on_or_held_out_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = demo_clips()
    assert [clip.held_out for clip in clips] == [False] * 5 + [True] * 5
    assert all(isinstance(clip, Clip) and clip.questions and len(clip.frames) >= 20 for clip in clips)


def test_an_export_without_clips_is_judged_by_small_ones_of_the_demonstrations_world() -> None:
    clips = judged_clips()
    assert [clip.held_out for clip in clips] == [True] * 2 and all(len(clip.frames) == 20 for clip in clips)
    shipped = PreprocessConfig(max_pixels=JUDGED_PIXELS.max_pixels)
    (whole,) = [clip for clip in demo_clips() if clip.name == clips[0].name]
    assert (resize_frame(whole.frames[3], shipped) == clips[0].frames[3]).all() and clips[0].frames[
        3
    ].size == 84 * 140 * 3
    assert all(min(clip.questions) < 2 for clip in clips)


CALIBRATED, HELD_OUT = [False] * 5, [True] * 5


@pytest.mark.parametrize(
    ("words", "held_out"),
    [
        ("", [True, True]),
        ("--weights int4 --method nearest", [True, True]),
        ("--weights int4", CALIBRATED + HELD_OUT),
        ("--weights int4 --held-out {}", [*CALIBRATED, True]),
        ("--held-out {}", [True]),
        ("--calibration {}", [None]),
        ("--calibration {} --held-out {} {}", [False, True, True]),
    ],
)
def test_every_export_has_held_out_turns(
    words: str, held_out: list[bool | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Clip] = []

    def stop(*_: object, clips: list[Clip], **__: object) -> None:
        given.extend(clips)
        raise UsageError("far enough")

    monkeypatch.setattr("export.api.export_checkpoint", stop)
    scene = SCENE.format(24)
    assert main(["export", str(CHECKPOINT), "-o", str(tmp_path / "b"), *words.format(*[scene] * 3).split()]) == 2
    assert [clip.held_out for clip in given] == held_out


def test_a_layers_precision_must_be_spelt_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", "x", "-o", str(tmp_path / "b"), "--layer", "layers.0"]) == 2
    assert "NAME=PRECISION" in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_with_clips_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(CHECKPOINT), "-o", str(tmp_path / "bundle"), "--weights", "int4", "--json"]
    assert main([*words, "--calibration", SCENE.format(30)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["precision"]["method"] == "gptq" and len(document["kv_layers"]) == 6
    assert main(["inspect", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert "KV cache by layer" in shown and "gptq, blocks of 32" in shown

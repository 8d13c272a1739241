"""The command line as a user meets it: exit codes, one clear error, data on stdout, files that stay readable."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from streams import picture, write_video

from apps.cli.main import COMMANDS, main
from apps.cli.run import parse_closings
from apps.demo import CHECKPOINT
from edge.bundle import Bundle
from edge.errors import UsageError
from edge.runtime import Question

ROOT = Path(__file__).resolve().parent.parent
ASK = ("--ask", "Describe each event when it ends.")
FAST = ("--pace", "fast", "--max-reply-tokens", "4", "--threads", "1")


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; there must be exactly one, at most one hint, and no traceback."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert sum(line.startswith("hint: ") for line in lines) <= 1, self.err
        assert "Traceback" not in self.err + self.out
        assert "internal" not in errors[0], self.err
        return errors[0]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process; what native libraries print counts as well."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def copied(demo_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the demonstration's bundle, to be spoilt."""
    return Path(shutil.copytree(demo_bundle.path, tmp_path / "bundle"))


# Usage


@pytest.mark.parametrize(
    ("words", "found", "hint"),
    [
        (["exprot"], "exprot", "streamo-edge export"),
        (["--versoin"], "--versoin", "--version"),
        (["export"], "CHECKPOINT", "--help"),
        (["export", "x", "-o", "y", "--wieghts", "int4"], "--wieghts", "--weights"),
        (["export", "x", "-o", "y", "--weights", "int9"], "int9", "int8"),
        (["run", "b", "--source", "s", "--window", "0"], "at least 1", "--help"),
        (["run", "b", "--source", "s", "--threads", "two"], "'two'", "--help"),
        (["run", "b", "--source", "s"], "no question", "--ask"),
        (["run", "b", "--source", "s", "--ask", " "], "empty", "--ask"),
        (["run", "b", "--source", "s", "--ask-at", "soon", "Why?"], "'soon'", "--ask-at 12"),
        (["run", "b", "--source", "s", "--ask-at", "nan", "Why?"], "'nan'", "--ask-at 12"),
        (["run", "b", "--source", "s", "--ask", "Why?", "--close-at", "soon", "Why?"], "'soon'", "--close-at 12"),
        (["run", "b", "--source", "s", "--ask", "Why?", "--close-at", "9", "Wy?"], "nobody asks 'Wy?'", "`Why?`"),
        (["run", "b", "--source", "s", "--ask-at", "9", "Why?", "--close-at", "3", "Why?"], "before it is", "later"),
        (["run", "b", "--source", "s", "--ask", "a", "--policy", "slid"], "slid", "`slide`"),
        (["run", "b", "--source", "synthetic:tabel", "--ask", "a"], "tabel", "`table`"),
        (["run", "b", "--source", "synthetic:table?sed=7", "--ask", "a"], "`sed`", "`seed`"),
        (["run", "b", "--source", "synthetic:table?seconds=1", "--ask", "a"], "found '1'", "seconds=60"),
        (["eval", "demo", "--bundle", "b", "--seeds", "9:3"], "9:3", "--help"),
        (["bench", "trun", "--bundle", "b"], "trun", "turn"),
        (["demo", "--seconds", "3"], "at least 24", "--help"),
        (["run", "b", "--source", "s", "--window", "1" + "0" * 400], "(401 characters)", "--help"),
        (["run", "b", "--source", "s", "--window", "9" * 5000], "(5000 characters)", "--help"),
        (["run", "b", "--source", "s", "--fps", "1e-320"], "at least 0.001", "--help"),
        (["eval", "demo", "--seeds", "0:999999999999"], "at most 1000000 seeds", "--help"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_was_meant(cli, words, found, hint):
    outcome = cli(*words)
    assert outcome.code == 2
    assert found in outcome.error
    assert hint in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli, command):
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert f"streamo-edge {command}" in outcome.out


def test_the_help_names_every_command_and_exit_code(cli):
    outcome = cli("--help")
    assert outcome.code == 0
    assert all(f"  {command} " in outcome.out for command in COMMANDS)
    assert "70 device unusable" in outcome.out


# Bundles


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [Path.unlink, truncate, alter, lambda path: path.rename(path.with_name("other"))])
@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.data", "vision.data", "embeddings.bin", "tokenizer.json"])
def test_a_spoilt_file_of_a_bundle_is_named(cli, copied, name, spoil):
    spoil(copied / name)
    outcome = cli("inspect", copied)
    assert outcome.code == 3
    assert f"`{name}`" in outcome.error


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (Path.unlink, "not a bundle"),
        (truncate, "not valid JSON"),
        (lambda path: path.write_text("[]"), "JSON object"),
        (lambda path: path.write_text('{"schema": "streamo.bundle/9"}'), "streamo.bundle/9"),
        (lambda path: path.write_text('{"schema": "streamo.bundle/3"}'), "`manifest.json`"),
    ],
)
def test_a_spoilt_manifest_is_explained(cli, copied, spoil, found):
    spoil(copied / "manifest.json")
    outcome = cli("run", copied, "--source", "synthetic:table", *ASK)
    assert outcome.code == 3
    assert found in outcome.error


def test_a_bundle_that_does_not_exist_is_named(cli, tmp_path):
    outcome = cli("inspect", tmp_path / "nowhere")
    assert outcome.code == 3
    assert "nowhere" in outcome.error


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_checkpoint_of_another_architecture_is_refused(cli, checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", lambda config: config.update(architectures=["LlamaForCausalLM"]))
    outcome = cli("export", checkpoint, "-o", tmp_path / "bundle")
    assert outcome.code == 3
    assert "LlamaForCausalLM" in outcome.error
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_without_the_state_tokens_is_refused(cli, checkpoint, tmp_path):
    text = (checkpoint / "tokenizer.json").read_text().replace("</Standby>", "</Stanby>")
    (checkpoint / "tokenizer.json").write_text(text)
    outcome = cli("export", checkpoint, "-o", tmp_path / "bundle")
    assert outcome.code == 3
    assert "</Standby>" in outcome.error


def test_a_pickled_checkpoint_is_refused(cli, checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    outcome = cli("export", checkpoint, "-o", tmp_path / "bundle")
    assert outcome.code == 3
    assert "pickle" in outcome.err.lower() or "safetensors" in outcome.error


def test_truncated_weights_are_refused(cli, checkpoint, tmp_path):
    truncate(checkpoint / "model.safetensors")
    outcome = cli("export", checkpoint, "-o", tmp_path / "bundle")
    assert outcome.code == 3
    assert "model.safetensors" in outcome.error
    assert not (tmp_path / "bundle").exists()


def test_an_existing_folder_is_not_overwritten_by_an_export(cli, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    outcome = cli("export", CHECKPOINT, "-o", tmp_path / "mine")
    assert outcome.code in (1, 2)
    assert "mine" in outcome.error
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


# Sources


def test_a_video_that_does_not_exist_exits_with_4(cli, demo_bundle, tmp_path):
    outcome = cli("run", demo_bundle.path, "--source", tmp_path / "no.mp4", *ASK)
    assert outcome.code == 4
    assert "no.mp4" in outcome.error


@pytest.mark.parametrize("content", [b"", b"this is no video" * 64])
def test_a_file_that_is_no_video_exits_with_4(cli, demo_bundle, tmp_path, content):
    path = tmp_path / "talk.mp4"
    path.write_bytes(content)
    outcome = cli("run", demo_bundle.path, "--source", path, *ASK, *FAST)
    assert outcome.code == 4
    assert "talk.mp4" in outcome.error


def test_a_folder_without_pictures_exits_with_4(cli, demo_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = cli("run", demo_bundle.path, "--source", tmp_path / "empty", *ASK, *FAST)
    assert outcome.code == 4
    assert "empty" in outcome.error


def test_a_video_that_ends_early_gives_its_turns_and_says_so(cli, demo_bundle, tmp_path):
    video = write_video(tmp_path / "cut.avi", [picture(i, 64, 96) for i in range(80)], 10, "MJPG")
    os.truncate(video, video.stat().st_size // 2)
    events = tmp_path / "events.jsonl"
    outcome = cli("run", demo_bundle.path, "--source", video, *ASK, *FAST, "--output", events, "--json")
    assert outcome.code == 0
    assert 2 <= json.loads(outcome.out.splitlines()[-1])["turns"] < 8
    ended = [line for line in events.read_text().splitlines() if '"source.state"' in line]
    assert "early" in outcome.err or "ended" in json.loads(ended[-1])["state"]


def test_pictures_that_change_size_midway_are_all_watched(cli, demo_bundle, tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (height, width) in enumerate([(60, 100), (60, 100), (120, 50), (33, 47)]):
        Image.fromarray(np.full((height, width, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    outcome = cli("run", demo_bundle.path, "--source", folder, *ASK, *FAST, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out.splitlines()[-1])["turns"] == 4


def test_a_broken_picture_midway_ends_the_run_with_readable_outputs(cli, demo_bundle, tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"nothing")
    events, captions = tmp_path / "events.jsonl", tmp_path / "talk.vtt"
    outputs = ("--output", events, "--output", captions, "--every-turn")
    outcome = cli("run", demo_bundle.path, "--source", folder, *ASK, *FAST, *outputs)
    assert outcome.code == 4
    assert "3.png" in outcome.error
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum(event["type"] == "turn.state" for event in told) >= 2
    assert told[-1]["type"] == "session.ended"
    assert captions.read_text().startswith("WEBVTT")


# Questions, options, outputs


def test_a_question_longer_than_the_window_exits_with_2(cli, demo_bundle):
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table", "--ask", "why " * 5000, *FAST)
    assert outcome.code == 2
    assert "token" in outcome.error


@pytest.mark.parametrize("words", [("--fps", "4"), ("--top-p", "7")])
def test_what_this_version_cannot_do_is_said(cli, demo_bundle, words):
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table?seconds=2", *ASK, "--pace", "fast", *words)
    assert outcome.code == 2
    assert words[1] in outcome.error


def test_without_native_kernels_sliding_is_refused_and_the_default_says_what_it_does_instead(
    cli, demo_bundle, monkeypatch
):
    monkeypatch.setattr("edge.native.available", lambda: "The native kernels are not there")
    run = ("run", demo_bundle.path, "--source", "synthetic:table?seconds=2", *ASK, *FAST)
    outcome = cli(*run, "--policy", "slide")
    assert outcome.code == 2 and "`slide`" in outcome.error and "--policy rebuild" in outcome.err
    outcome = cli(*run)
    assert outcome.code == 0 and "policy rebuild" in outcome.err
    assert outcome.err.count("cannot slide") == 1


def test_a_run_says_what_its_window_holds_before_it_starts(cli, demo_bundle):
    run = ("run", demo_bundle.path, "--source", "synthetic:table?seconds=2", *ASK, *FAST)
    outcome = cli(*run, "--window", "30", "--fps", "0.5")
    assert "window 30 turns = 60 s, at most " in outcome.err
    assert "KV cache" in outcome.err and outcome.code == 0


def test_a_question_is_closed_when_its_second_comes(cli, demo_bundle, tmp_path):
    events = tmp_path / "events.jsonl"
    closed = ("--close-at", "2", ASK[1], "--output", events)
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table?seconds=4", *ASK, *closed, *FAST)
    assert outcome.code == 0, outcome.err
    told = [json.loads(line) for line in events.read_text().splitlines() if "question.closed" in line]
    assert [(event["text"], event["media_time"]["start_s"]) for event in told] == [(ASK[1], 2.0)]


def test_a_window_that_does_not_fit_in_memory_exits_with_5_and_both_numbers(cli, demo_bundle):
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table", *ASK, "--window", "1000000000")
    assert outcome.code == 5
    assert "1000000000 turns needs" in outcome.error and "is free" in outcome.error
    assert "--window" in outcome.err


@pytest.mark.parametrize("name", ["missing/events.jsonl", ".", "talk.docx"])
def test_an_output_that_cannot_be_written_is_told_before_the_stream_starts(cli, demo_bundle, tmp_path, name):
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table", *ASK, *FAST, "--output", tmp_path / name)
    assert outcome.code == (1 if name.startswith("missing") else 2)
    assert str(tmp_path / name) in outcome.error


@pytest.mark.parametrize(
    ("words", "code"), [((), 3), (("--fps", "2"), 2), (("--output", "missing/a.srt"), 1), (("--window", "x"), 2)]
)
def test_a_failed_start_leaves_no_empty_outputs(cli, tmp_path, words, code):
    outputs = [word for name in ("a.jsonl", "a.vtt", "a.srt", "a.mp4") for word in ("--output", tmp_path / name)]
    outcome = cli("run", tmp_path / "nowhere", "--source", "synthetic:table", *ASK, *outputs, *words)
    assert outcome.code == code and outcome.error
    assert list(tmp_path.iterdir()) == []


def test_an_output_never_replaces_the_recording_that_is_watched(cli, tmp_path):
    video = write_video(tmp_path / "talk.mp4", [picture(i) for i in range(20)], 10)
    before = video.read_bytes()
    outcome = cli("run", tmp_path / "b", "--source", video, *ASK, "--output", tmp_path / "." / "talk.mp4")
    assert outcome.code == 2 and "is the source" in outcome.error
    assert video.read_bytes() == before


def test_a_later_question_that_is_too_long_is_told_before_the_stream_starts(cli, demo_bundle, tmp_path):
    later = ("--ask-at", "40", "why " * 5000, "--output", tmp_path / "a.jsonl")
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table", *ASK, *later, *FAST)
    assert outcome.code == 2 and "at 40 s" in outcome.error
    assert list(tmp_path.iterdir()) == []


# What works


def test_json_is_the_last_line_of_stdout_and_the_only_one(cli, demo_bundle):
    outcome = cli("inspect", demo_bundle.path, "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert document["tokens"]["largest_turn"] == document["tokens"]["turn_text"] + document["max_visual_tokens"]
    assert document["kv_window_bytes"] == document["window_tokens"] * document["kv_bytes_per_token"]
    assert document["parity"]["passed"] is True
    assert document["turns_that_fit"] * document["turn_bytes"] < document["free_bytes"]


def test_inspect_counts_tokens_as_the_session_does(demo_bundle):
    import edge
    from apps.cli.inspect import describe

    session = edge.StreamSession(demo_bundle, threads=1)
    document = describe(demo_bundle)
    frame = np.zeros((336, 560, 3), np.uint8)
    session.push(frame, 99_998)
    before = session.kv_tokens
    session.push(frame, 99_999)  # the longest time tag that the plan reckons with
    assert session.kv_tokens - before == document["tokens"]["largest_turn"]
    assert session.kv_capacity_tokens == document["window_tokens"]


def test_a_run_writes_every_output_and_its_figures(cli, demo_bundle, tmp_path):
    files = [tmp_path / name for name in ("events.jsonl", "talk.vtt", "talk.srt", "out.mp4")]
    outputs = [word for file in files for word in ("--output", file)]
    source = "synthetic:table?seed=3&seconds=4"
    outcome = cli("run", demo_bundle.path, "--source", source, *ASK, "--ask-at", "2", "Why?", *FAST, *outputs, "--json")
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert figures["turns"] == 4 and figures["end_reason"] == "ended"
    assert {"preprocess", "encode", "append", "decode", "turn"} <= set(figures["times_ms"])
    asked = [json.loads(line) for line in files[0].read_text().splitlines() if "question.asked" in line]
    assert [event["media_time"]["start_s"] for event in asked] == [0.0, 2.0]
    assert all(file.stat().st_size > 0 for file in files)


def test_a_question_whose_second_never_came_is_told(cli, demo_bundle):
    source = "synthetic:table?seconds=2"
    outcome = cli("run", demo_bundle.path, "--source", source, *ASK, "--ask-at", "50", "Why?", *FAST, "--json")
    assert outcome.code == 0
    assert "Questions never asked" in outcome.err
    assert json.loads(outcome.out)["questions_left"] == 1


@pytest.mark.parametrize(("fps", "turns"), [("1", 4), ("0.5", 2), ("0.4", 2)])  # 0 1 2 3; 0 2; 0 2
def test_a_run_stops_after_the_seconds_it_was_given(cli, demo_bundle, fps, turns):
    words = (*ASK, *FAST, "--seconds", "4", "--fps", fps, "--json")
    outcome = cli("run", demo_bundle.path, "--source", "synthetic:table", *words)
    assert outcome.code == 0
    assert json.loads(outcome.out)["turns"] == turns


def test_memory_that_runs_out_is_told_without_a_traceback(cli, monkeypatch):
    def fail(args):
        raise MemoryError("Unable to allocate 9.00 TiB")

    monkeypatch.setattr("apps.cli.export.run", fail)
    outcome = cli("export", "checkpoint", "-o", "bundle")
    assert outcome.code == 5 and "Out of memory: Unable to allocate 9.00 TiB" in outcome.error
    assert "hint: End other programs" in outcome.err


def test_a_question_asked_twice_may_be_closed_after_the_first_time():
    questions = [Question(10, "Why?"), Question(5, "Why?")]
    assert [closing.at_s for closing in parse_closings([("7", "Why?")], questions)] == [7]
    with pytest.raises(UsageError, match="before it is asked at 5 s"):
        parse_closings([("4", "Why?")], questions)


# Processes: signals, pipes and what no test in one process can see


def started(*words: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "apps.cli", *(str(word) for word in words)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}, **options
    )


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_an_interrupted_run_ends_quietly_with_readable_outputs(demo_bundle, tmp_path, sent, code):
    events, video = tmp_path / "events.jsonl", tmp_path / "out.mp4"
    process = started(
        "run", demo_bundle.path, "--source", "synthetic:table?seconds=600", *ASK, "--max-reply-tokens", "4",
        "--output", events, "--output", video, "--every-turn",
    )  # fmt: skip
    deadline_s = time.monotonic() + 60
    while not (events.exists() and "turn.state" in events.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err and "error:" not in err
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert told[-1]["type"] == "session.ended"
    assert video.stat().st_size > 0


def test_a_reader_that_leaves_is_no_error(demo_bundle):
    process = started("inspect", demo_bundle.path)
    process.stdout.close()
    process.wait(timeout=30)
    assert process.stderr.read() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("inspect",), ("inspect", "--json")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_one_error(demo_bundle, words, unbuffered):
    command = [*words, demo_bundle.path] if words[0] == "inspect" else words
    process = [sys.executable, "-m", "apps.cli", *map(str, command)]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            process, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment
        )
    outcome = Outcome(done.returncode, "", done.stderr)
    assert outcome.code == 1
    assert "Standard output cannot be written: No space left" in outcome.error


@pytest.mark.parametrize("words", [("demo",), ("eval", "demo"), ("bench", "turn")])
def test_a_missing_package_is_named_with_what_brings_it(cli, monkeypatch, tmp_path, words):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("export", "onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    outcome = cli(*words)
    assert outcome.code == 2
    assert "needs the package `onnx`" in outcome.error and "pip install '.[demo]'" in outcome.err


def test_an_unexpected_failure_names_its_log_and_shows_no_traceback(cli, monkeypatch, tmp_path):
    import tempfile

    import apps.cli.inspect

    def fail(args):
        raise RuntimeError("surprise")

    monkeypatch.setattr(apps.cli.inspect, "run", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = cli("inspect", "anything")
    assert outcome.code == 1
    assert "error: internal: RuntimeError: surprise" in outcome.err
    assert "Traceback" not in outcome.err
    (log,) = tmp_path.glob("streamo-edge-*.log")
    assert str(log) in outcome.err
    assert "RuntimeError: surprise" in log.read_text()


def test_no_colour_is_written_where_none_is_wanted(demo_bundle):
    process = started("inspect", demo_bundle.path)
    out, err = process.communicate(timeout=30)
    assert "\x1b" not in out + err

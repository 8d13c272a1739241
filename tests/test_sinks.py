"""Outputs: what each file holds, at every moment, and what is said when it cannot be written."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import picture

from edge.clock import FakeClock
from edge.errors import OutputError, UsageError
from edge.events import (
    QUESTION_ASKED,
    RESPONSE_COMPLETED,
    RESPONSE_CREATED,
    RESPONSE_DELTA,
    SESSION_CREATED,
    SOURCE_STATE,
    TURN_STATE,
    EventFactory,
    media_time,
)
from edge.frames import Frame
from edge.sinks import open_sinks
from edge.sinks.caption_bar import BarContent, CaptionBar, wrap
from edge.sinks.jsonl import JsonlSink
from edge.sinks.plain import one_line
from edge.sinks.srt import SrtSink
from edge.sinks.text import TextSink
from edge.sinks.video import VIDEO_FPS, VideoSink
from edge.sinks.vtt import VttSink

ROOT = Path(__file__).resolve().parent.parent
FACTORY = EventFactory("s-test", "cam0", FakeClock())
LIVE = FACTORY.make(SOURCE_STATE, state="live")
NASTY = "a\x1b[31mred\x1b[0m\r\n\n2 --> 3 <b>& \u202eevil\x07 ok"


def event(kind: str, t: int, **fields):
    return FACTORY.make(kind, media_time=media_time(t, t + 1), **fields)


def reply(t: int, text: str, **fields):
    return event(RESPONSE_COMPLETED, t, text=text, state="response", final=True, **fields)


# Text


def spoken(sink_options, *events) -> str:
    stream = io.StringIO()
    sink = TextSink(stream, **sink_options)
    for each in events:
        sink.handle(each)
    sink.close()
    return stream.getvalue()


TALK = [
    event(QUESTION_ASKED, 2, text="What happens?"),
    event(RESPONSE_CREATED, 310),
    event(RESPONSE_DELTA, 310, text=" A red"),
    event(RESPONSE_DELTA, 310, text=" ball."),
    reply(310, "A red ball."),
    reply(3700, "Cut", truncated=True),
]


@pytest.mark.parametrize("as_spoken", [True, False])
def test_text_has_a_line_for_each_question_and_reply(as_spoken):
    text = spoken({"as_spoken": as_spoken, "colour": False}, *TALK)
    assert text == "[00:00:02] ? What happens?\n[00:05:10] A red ball.\n[01:01:40] Cut ...\n"


def test_text_appears_while_it_is_said_only_on_a_terminal():
    assert spoken({"as_spoken": True, "colour": False}, *TALK[1:3]) == "[00:05:10] A red\n"
    assert spoken({}, *TALK[1:3]) == ""


@given(st.text())
def test_nothing_that_the_model_says_can_move_a_cursor_or_break_a_line(text):
    shown = spoken(
        {"as_spoken": True, "colour": False}, event(RESPONSE_CREATED, 0), event(RESPONSE_DELTA, 0, text=text)
    )
    whole = spoken({"colour": False}, reply(0, text))
    for output in (shown, whole):
        assert output.count("\n") == 1 and output.endswith("\n")
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output)


def test_a_closed_reader_of_standard_output_is_one_clear_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    with pytest.raises(OutputError, match="closed by the program that reads it"):
        TextSink(stream).handle(reply(1, "Hello"))
    os.dup2(os.open(os.devnull, os.O_WRONLY), write_end)
    stream.close()


def test_a_terminal_that_knows_few_characters_still_gets_the_text():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    TextSink(stream).handle(reply(1, "caf\u00e9"))
    assert stream.buffer.getvalue() == b"[00:00:01] caf\\xe9\n"


# JSON lines


def test_events_are_lines_that_are_whole_at_any_moment(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"seq":1}\n{"seq":2,"te')  # what a killed process left
    sink = JsonlSink(path)
    sink.open()
    for each in [*TALK, reply(4, NASTY + "\ud800")]:
        sink.handle(each)
        lines = path.read_text().splitlines()
        assert json.loads(lines[-1])["seq"] == each.seq
    sink.close()
    assert lines[:2] == ['{"seq":1}', '{"seq":2,"te'] and len(lines) == 2 + len(TALK) + 1
    assert json.loads(lines[-1])["text"] == NASTY + "\ud800"


def test_a_record_that_only_fits_in_part_is_taken_back(tmp_path, monkeypatch):
    sink = JsonlSink(tmp_path / "events.jsonl")
    sink.handle(TALK[0])
    before = (tmp_path / "events.jsonl").read_bytes()
    real, calls = os.pwrite, []

    def full_disk(descriptor, data, offset):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        sink.handle(TALK[4])
    monkeypatch.undo()
    assert (tmp_path / "events.jsonl").read_bytes() == before


# Captions


def cues(path: Path) -> list[tuple[float, float, str]]:
    """A small reader of both formats: (start, end, text)."""
    pattern = r"(\d+):(\d\d):(\d\d)[.,](\d{3}) --> (\d+):(\d\d):(\d\d)[.,](\d{3})\n([^\n]+)\n\n"
    found = []
    for match in re.finditer(pattern, path.read_text()):
        h, m, s, ms, h2, m2, s2, ms2 = map(int, match.groups()[:8])
        found.append((h * 3600 + m * 60 + s + ms / 1e3, h2 * 3600 + m2 * 60 + s2 + ms2 / 1e3, match.group(9)))
    return found


@pytest.mark.parametrize("kind, suffix", [(VttSink, "vtt"), (SrtSink, "srt")])
@given(turns=st.lists(st.tuples(st.integers(1, 40_000), st.text(min_size=1)), max_size=12))
def test_captions_are_valid_after_every_reply_and_never_overlap(tmp_path_factory, kind, suffix, turns):
    path = tmp_path_factory.mktemp("captions") / f"talk.{suffix}"
    sink, t, expected = kind(path), 0, []
    sink.open()
    sink.handle(LIVE)
    for step, text in turns:
        t += step
        sink.handle(reply(t, text))
        if text.strip():
            expected.append((float(t), one_line(text)))
        read = cues(path)
        assert [start for start, _, _ in read] == [start for start, _ in expected]
        assert all(1.0 <= end - start <= 6.0 for start, end, _ in read)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(read))
    sink.close()
    text = path.read_text()
    assert (
        text.startswith("WEBVTT\n\n")
        if suffix == "vtt"
        else [*re.findall(r"(?m)^(\d+)\n\d+:", text)] == [str(number + 1) for number in range(len(expected))]
    )


def test_a_caption_stays_until_it_is_read_or_the_next_one_comes(tmp_path):
    sink = VttSink(tmp_path / "talk.vtt")
    for each in (LIVE, reply(3, "Yes."), reply(60, "x" * 300), reply(62, NASTY)):
        sink.handle(each)
    read = cues(tmp_path / "talk.vtt")
    assert [(start, round(end, 2)) for start, end, _ in read][:2] == [(3.0, 4.77), (60.0, 62.0)]
    assert "--&gt; 3 &lt;b&gt;&amp;" in read[2][2] and "\\x1b[31m" in read[2][2]


def test_captions_of_an_earlier_run_stay_until_the_stream_has_started(tmp_path):
    path = tmp_path / "talk.vtt"
    path.write_text("WEBVTT\n\nold")
    sink = VttSink(path)
    sink.open()
    sink.handle(FACTORY.make(SESSION_CREATED))
    assert path.read_text().endswith("old")
    sink.handle(LIVE)
    assert path.read_text() == "WEBVTT\n\n"


KILLED = """
import itertools, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_sinks import *
sinks = open_sinks([{folder!r} + "/" + name for name in ("e.jsonl", "t.vtt", "t.srt")])
for sink in sinks: sink.handle(LIVE)
print("ready", flush=True)
for t in itertools.count(0, 2):
    said = reply(t, "reply number %d" % t)
    for sink in sinks: sink.handle(said)
"""


def test_files_of_a_killed_process_are_readable(tmp_path):
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    while not (tmp_path / "t.srt").exists() or (tmp_path / "t.srt").stat().st_size < 20_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lines = (tmp_path / "e.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["seq"] for line in lines[1:]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    for name in ("t.vtt", "t.srt"):
        read = cues(tmp_path / name)
        assert len(read) > 100
        assert [text for _, _, text in read] == [f"reply number {2 * n}" for n in range(len(read))]


# Captioned video


def test_a_captioned_video_shows_the_picture_at_its_time_and_the_words_below(tmp_path):
    path = tmp_path / "out.mp4"
    sink = VideoSink(path)
    sink.open()
    for number in range(31):
        value = 40 if number < 15 else 220
        sink.handle_frame(Frame(picture(value), number / 10))
        if number == 10:
            sink.handle(event(QUESTION_ASKED, 1, text="What is red?"))
            sink.handle(event(TURN_STATE, 1, state="silence"))
        if number == 20:
            for each in (event(RESPONSE_CREATED, 2), event(RESPONSE_DELTA, 2, text="All"), reply(2, "All of it.")):
                sink.handle(each)
    sink.handle(event(TURN_STATE, 3, state="standby"))
    sink.close()
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == VIDEO_FPS
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert len(frames) == 40, "the last turn's second is shown to its end"
    picture_height = 480
    reds = [float(frame[50 : picture_height - 50, :, 2].mean()) for frame in frames]
    assert all(abs(red - 40) < 8 for red in reds[:15]) and all(abs(red - 220) < 8 for red in reds[16:])
    brightness = [float(frame[picture_height:].astype(int).max(axis=2).clip(60).mean()) for frame in frames]
    assert brightness[5] < brightness[15] < brightness[25], "question and reply add bright letters"


def test_a_video_whose_picture_changes_size_keeps_its_own(tmp_path):
    path = tmp_path / "out.mp4"
    sink = VideoSink(path)
    sink.open()
    for number, shape in enumerate([(48, 64), (30, 90), (90, 30), (1, 1), (301, 203)]):
        sink.handle_frame(Frame(picture(200, *shape), number * 0.5))
    sink.close()
    video = cv2.VideoCapture(str(path))
    count = 0
    while video.read()[0]:
        count += 1
    assert count == 20


def test_a_gap_of_an_hour_does_not_fill_the_disk(tmp_path):
    sink = VideoSink(tmp_path / "out.mp4")
    sink.open()
    for time_s in (0.0, 0.1, 3600.0, 3600.1):
        sink.handle_frame(Frame(picture(9), time_s))
    sink.close()
    assert int(cv2.VideoCapture(str(tmp_path / "out.mp4")).get(cv2.CAP_PROP_FRAME_COUNT)) < 10


def test_a_video_without_a_picture_leaves_no_empty_file(tmp_path):
    sink = VideoSink(tmp_path / "out.mp4")
    sink.open()
    sink.close()
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=300), st.text(max_size=300), st.integers(200, 1400))
def test_any_text_fits_the_bar(question, text, width):
    bar = CaptionBar(width)
    drawn = bar.render(BarContent(5, "response", question, text, False, ("", "silence", "standby", "response")))
    assert drawn.shape == (bar.height, width, 3) and drawn.dtype == np.uint8 and bar.height % 2 == 0


@given(st.text(alphabet="ab cdefg", max_size=200), st.integers(4, 40), st.integers(1, 4))
def test_wrapped_lines_are_no_wider_than_the_room(text, room, lines):
    wrapped = wrap(text, len, room, lines=lines)
    assert len(wrapped) <= lines and all(len(line) <= room for line in wrapped)
    if len("".join(wrapped)) and not any("..." in line for line in wrapped):
        assert "".join(wrapped).replace(" ", "") == text.replace(" ", "")


# Opening


@pytest.mark.parametrize(
    "output, kind, message, hint",
    [
        ("missing/a.jsonl", OutputError, "No such file", "mkdir -p"),
        ("missing/a.mp4", OutputError, "No such file", "mkdir -p"),
        ("file/a.vtt", OutputError, "Not a directory", "folders"),
        ("folder.srt", OutputError, "Is a directory", "not of a folder"),
        ("a.jsnl", UsageError, "found `.jsnl`", "a.jsonl`"),
        ("a.docx", UsageError, "found `.docx`", ".vtt"),
        ("a", UsageError, "found no suffix", ".jsonl"),
    ],
)
def test_an_output_that_cannot_be_is_named_before_the_stream_starts(tmp_path, output, kind, message, hint):
    (tmp_path / "folder.srt").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(kind, match=message) as caught:
        open_sinks([str(tmp_path / "good.jsonl"), str(tmp_path / output)])
    assert hint in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        open_sinks([str(tmp_path / "a.vtt")])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", ["jsonl", "vtt", "srt", "mp4"])
def test_a_full_disk_is_one_clear_error(tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    path.symlink_to("/dev/full")
    sink = open_sinks([str(path)])[0]
    with pytest.raises(OutputError) as caught:
        sink.handle(LIVE)
        sink.handle(reply(1, "Hello"))
        sink.handle_frame(Frame(picture(1), 0.0))
    assert str(path) in str(caught.value) and "space" in caught.value.hint
    sink.close()


@pytest.mark.parametrize("suffix", ["jsonl", "vtt", "srt", "mp4"])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"a.{suffix}")
    with pytest.raises(OutputError, match="regular file, found a pipe"):
        open_sinks([str(tmp_path / f"a.{suffix}")])


def test_outputs_of_a_stream_that_never_starts_leave_what_was_there_and_nothing_new(tmp_path):
    kept = tmp_path / "old.vtt"
    kept.write_text("")
    names = [str(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "vtt", "srt", "mp4")]
    for sink in open_sinks([*names, str(kept)]):
        sink.open()
        sink.close()
        sink.close()
    with pytest.raises(OutputError):
        open_sinks([*names, str(tmp_path / "missing" / "a.srt")])
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("link", ["same", "./same", "hard", "symbolic"])
def test_an_output_never_replaces_the_source(tmp_path, link):
    recording = tmp_path / "same.mp4"
    recording.write_bytes(b"recording")
    os.link(recording, tmp_path / "hard.mp4")
    (tmp_path / "symbolic.mp4").symlink_to(recording)
    with pytest.raises(UsageError, match="is the source"):
        open_sinks([f"{tmp_path}/{link}.mp4"], source=str(recording))
    assert recording.read_bytes() == b"recording"


def test_a_disk_that_fills_up_ends_the_video_while_its_index_still_fits(tmp_path, monkeypatch):
    sink = VideoSink(tmp_path / "out.mp4")
    sink.open()
    sink.handle_frame(Frame(picture(9), 0.0))
    sink.handle_frame(Frame(picture(9), 5.0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(OutputError, match=r"1\.0 MiB are free on its disk, 16 MiB are needed"):
        for second in range(6, 30):
            sink.handle_frame(Frame(picture(9), float(second)))
    sink.close()
    assert int(cv2.VideoCapture(str(tmp_path / "out.mp4")).get(cv2.CAP_PROP_FRAME_COUNT)) >= 50


def test_the_same_file_twice_is_refused_and_no_output_means_text(tmp_path):
    with pytest.raises(UsageError, match="given twice"):
        open_sinks([str(tmp_path / "a.vtt"), str(tmp_path / "a.vtt")])
    with pytest.raises(UsageError, match="given twice"):
        open_sinks([str(tmp_path / "a.vtt"), str(tmp_path / "." / "x" / ".." / "a.vtt")])
    assert list(tmp_path.iterdir()) == []
    assert [type(sink) for sink in open_sinks([])] == [TextSink]
    names = [str(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "vtt", "srt", "mp4")]
    assert [sink.name for sink in open_sinks(["-", *names])] == ["standard output", *names]

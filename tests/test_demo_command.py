"""`streamo-edge demo` as on a fresh machine: no torch, no transformers, an empty cache, three files to look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, transformers=None, safetensors=None)
from apps.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, str]:
    """One run of the demonstration: its figures, its folder, and what people saw."""
    folder = tmp_path_factory.mktemp("demo")
    words = ("demo", "--pace", "fast", "--seconds", "24", "--output-dir", str(folder / "out"), "--json")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder, done.stderr


def test_it_runs_without_torch_and_serves_every_turn(shown):
    figures, _, said = shown
    assert figures["turns"] == 24 and figures["dropped_turns"] == 0
    assert {"append", "decode", "turn"} <= set(figures["times_ms"])
    assert "Traceback" not in said
    assert figures["times_faster_than_real_time"] > 1


def test_it_asks_several_questions_and_the_model_speaks(shown):
    figures, folder, said = shown
    events = [json.loads(line) for line in (folder / "out" / "events.jsonl").read_text().splitlines()]
    asked = [event for event in events if event["type"] == "question.asked"]
    replies = [event for event in events if event["type"] == "response.completed"]
    assert len(asked) == 4
    assert len(replies) == figures["responses"] > 0
    assert all(event["text"] in said for event in (*asked, *replies))


def test_it_leaves_captions_and_a_video_of_the_whole_stream(shown):
    import cv2

    figures, folder, _ = shown
    captions = (folder / "out" / "captions.vtt").read_text()
    assert captions.startswith("WEBVTT") and captions.count("-->") == figures["responses"]
    video = cv2.VideoCapture(str(folder / "out" / "demo.mp4"))
    seconds = video.get(cv2.CAP_PROP_FRAME_COUNT) / video.get(cv2.CAP_PROP_FPS)
    assert seconds == pytest.approx(24, abs=0.5)


def test_the_export_is_kept_in_the_cache(shown):
    _, folder, _ = shown
    (bundle,) = [path for path in (folder / "cache" / "streamo-edge").iterdir() if path.name != "passed"]
    held_out = json.loads((bundle / "manifest.json").read_text())["parity"]["held_out"]
    assert held_out["passed"] and held_out["compared_turns"] == 12 and "numpy" in held_out["reference"]

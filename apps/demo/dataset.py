"""Writes streams as video files with their labels: `python -m apps.demo.dataset --seeds 0:100 --out DIR`.

Owns the folder's layout: `videos/*.mp4`, `raw_data.json`, `stream_format.json`, `events.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import cv2

from apps.demo.formats import raw_format, stream_format
from apps.demo.world import Stream, make_stream

VIDEO_FPS = 10


def write_video(stream: Stream, path: Path, fps: int = VIDEO_FPS) -> None:
    """Write the stream's pictures as an MPEG-4 file; frame k shows time k / fps.

    Raises:
      OSError: the file cannot be written.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (stream.width, stream.height))
    if not writer.isOpened():
        raise OSError(f"cannot write the video {path}")
    try:
        for index in range(stream.duration_s * fps):
            writer.write(cv2.cvtColor(stream.render(index / fps), cv2.COLOR_RGB2BGR))
    finally:
        writer.release()


def write_dataset(seeds: range, out: Path, fps: int = VIDEO_FPS) -> None:
    """Write the streams of `seeds` and their labels under `out`.

    Raises:
      OSError: something cannot be written.
    """
    (out / "videos").mkdir(parents=True, exist_ok=True)
    raw, turns, events = [], [], {}
    for seed in seeds:
        stream = make_stream(seed)
        name = f"videos/{seed:08d}.mp4"
        write_video(stream, out / name, fps)
        raw.append(raw_format(stream, name))
        turns.append(stream_format(stream, name))
        events[name] = [asdict(event) for event in stream.events]
        print(f"{name}: {stream.task}, {stream.duration_s} s", file=sys.stderr)
    for file, content in (("raw_data.json", raw), ("stream_format.json", turns), ("events.json", events)):
        (out / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write demonstration streams as videos with Streamo-style labels.")
    parser.add_argument("--seeds", default="0:20", help="first:last, last excluded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fps", type=int, default=VIDEO_FPS)
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition(":")
    try:
        write_dataset(range(int(first), int(last)), arguments.out, arguments.fps)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

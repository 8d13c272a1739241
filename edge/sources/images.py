"""A folder of pictures as a stream. Owns their order and their times, one every `1 / fps` seconds."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from edge.errors import SourceError
from edge.frames import Frame
from edge.sources.base import Ending, SourceInfo

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"})


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `frame2` comes before `frame10`."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


class ImageFolderSource:
    """The pictures of one folder, in natural order; sizes may differ."""

    live = False

    def __init__(self, folder: Path, *, fps: float = 1.0) -> None:
        self.name = str(folder)
        self.ending: Ending | None = None
        self._folder = folder
        self._fps = fps
        self._paths: list[Path] = []
        self._index = 0

    def open(self) -> SourceInfo:
        """See `Source.open`."""
        try:
            found = [p for p in self._folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        except OSError as error:
            raise SourceError(f"Folder `{self._folder}` cannot be read: {error.strerror}") from error
        if not found:
            raise SourceError(
                f"Folder `{self._folder}` holds no picture: 0 files end in {', '.join(sorted(SUFFIXES))}",
                hint="Give a folder of pictures, or a video file",
            )
        self._paths = sorted(found, key=lambda path: natural_key(path.name))
        self._index = 0
        height, width = _load(self._paths[0]).shape[:2]
        return SourceInfo(width, height, self._fps, len(self._paths) / self._fps)

    def read(self) -> Frame | None:
        """See `Source.read`."""
        if self._index >= len(self._paths):
            self.ending = Ending(self._index, len(self._paths))
            return None
        frame = Frame(_load(self._paths[self._index]), self._index / self._fps)
        self._index += 1
        return frame

    def skip_to(self, media_time_s: float) -> int:
        """See `Source`."""
        newest = min(len(self._paths) - 1, math.floor(media_time_s * self._fps + 1e-6))
        skipped = max(0, newest - self._index)
        self._index += skipped
        return skipped

    def close(self) -> None:
        """See `Source.close`."""
        self._paths = []


def _load(path: Path) -> np.ndarray:
    """The picture as (H, W, 3) RGB, turned the way its camera was held."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        hint = "Install it with `pip install pillow`"
        raise SourceError("Pictures need Pillow, which is not installed", hint=hint) from error
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        hint = "Remove it from the folder, or repair it"
        raise SourceError(f"Picture `{path}` cannot be read: {error}", hint=hint) from error

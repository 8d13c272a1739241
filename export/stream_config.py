"""The checkpoint's small files about frames and streams, as the runtime will read them from the manifest.

Owns `preprocessor_config.json` and the optional `streamo.json`. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge.contract import StreamDefaults
from edge.errors import CheckpointError
from edge.preprocess import PreprocessConfig
from export.checkpoint import Checkpoint, parse_json, read_file
from export.config import is_number

PREPROCESSOR_FILE = "preprocessor_config.json"
STREAM_FILE = "streamo.json"
QWEN_MAX_PIXELS = 12_845_056
"""What an untouched Qwen2.5-VL folder says; Streamo trains with `edge.preprocess`'s own limits and keeps that file."""

LARGEST_PIXELS = 1 << 28


@dataclass(frozen=True)
class StreamFile:
    """`streamo.json`: what the checkpoint's author recommends for streams. Every key may be left out."""

    defaults: StreamDefaults
    spelled_states: bool = False


def read_preprocess(checkpoint: Checkpoint) -> tuple[PreprocessConfig, list[str]]:
    """How frames are prepared, and notes on what was not taken as the checkpoint says.

    Raises:
      CheckpointError: the file is missing, contradicts `config.json`, or holds no usable values.
    """
    facts = checkpoint.facts
    values = parse_json(PREPROCESSOR_FILE, read_file(checkpoint.folder_of(PREPROCESSOR_FILE), PREPROCESSOR_FILE))
    sizes = {"patch_size": facts.patch_size, "merge_size": facts.merge_size}
    for key, value in {**sizes, "temporal_patch_size": facts.temporal_patch_size}.items():
        found = values.get(key, value)
        _expect(found == value, PREPROCESSOR_FILE, key, f"{value} as in `config.json`", found)
    default = PreprocessConfig()
    size = values.get("size")
    _expect(size is None or isinstance(size, dict), PREPROCESSOR_FILE, "size", "an object", size)
    size = size or {}
    low = _first(values.get("min_pixels"), size.get("min_pixels"), size.get("shortest_edge"), default.min_pixels)
    high = _first(values.get("max_pixels"), size.get("max_pixels"), size.get("longest_edge"), default.max_pixels)
    notes = []
    if high == QWEN_MAX_PIXELS:
        low, high = default.min_pixels, default.max_pixels
        notes.append(f"max_pixels {QWEN_MAX_PIXELS} is Qwen's untouched value; Streamo's {low} to {high} is used")
    for key, value in (("min_pixels", low), ("max_pixels", high)):
        valid = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_PIXELS
        _expect(valid, PREPROCESSOR_FILE, key, f"a whole number from 1 to {LARGEST_PIXELS}", value)
    factor = facts.patch_size * facts.merge_size
    _expect(max(low, factor**2) <= high, PREPROCESSOR_FILE, "max_pixels", f"at least {max(low, factor**2)}", high)
    config = PreprocessConfig(
        **sizes,
        min_pixels=low,
        max_pixels=high,
        image_mean=_three(values.get("image_mean", default.image_mean), "image_mean"),
        image_std=_three(values.get("image_std", default.image_std), "image_std"),
    )
    _expect(min(config.image_std) > 0, PREPROCESSOR_FILE, "image_std", "three numbers above 0", config.image_std)
    return config, notes


def read_stream_file(checkpoint: Checkpoint) -> StreamFile:
    """The optional `streamo.json`.

    Raises:
      CheckpointError: it has an unknown key or a value of the wrong kind.
    """
    folder = checkpoint.folder_of(STREAM_FILE)
    if not (folder / STREAM_FILE).exists():
        return StreamFile(StreamDefaults())
    values = parse_json(STREAM_FILE, read_file(folder, STREAM_FILE))
    spelled = values.pop("spelled_states", False)
    _expect(isinstance(spelled, bool), STREAM_FILE, "spelled_states", "true or false", spelled)
    for key, value in values.items():
        _expect(key in StreamDefaults.__dataclass_fields__, STREAM_FILE, key, "no such key", value)
        valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _expect(valid, STREAM_FILE, key, "a whole number above 0", value)
    return StreamFile(StreamDefaults(**values), spelled)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _three(values: Any, key: str) -> tuple[float, float, float]:
    valid = isinstance(values, (list, tuple)) and len(values) == 3 and all(is_number(value) for value in values)
    _expect(valid, PREPROCESSOR_FILE, key, "three numbers", values)
    return float(values[0]), float(values[1]), float(values[2])


def _expect(holds: bool, file: str, key: str, expected: str, found: Any) -> None:
    if not holds:
        raise CheckpointError(f"`{file}` key `{key}`: expected {expected}, found {found!r}", hint=f"Correct `{file}`")

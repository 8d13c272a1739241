"""The short stream that a bundle is proved with: three frames of different sizes, a question, a reply token by token.

Owns its pixels and tokens. They are made with whole numbers only, so that every machine makes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.contract import TokenIds
from edge.preprocess import PreprocessConfig, grid_of, patchify, smart_resize
from edge.prompt import STREAMO
from edge.rope import image_positions, text_positions
from export.graph_check import Append
from export.tokens import encoder

FRAME_SIZES = ((360, 640), (300, 200), (96, 120))
"""Height and width: 16:9, portrait, and small; the frames have the sizes that the model makes of these."""
QUESTION = "What is happening?"
REPLY = " A cup moves."


@dataclass(frozen=True)
class Probe:
    """Frames as (patches, rows, columns), and the conversation as parts of token ids, as a runtime appends them."""

    frames: list[tuple[np.ndarray, int, int]]
    parts: list[np.ndarray]
    image_pad: int
    merge_size: int

    @property
    def ids(self) -> np.ndarray:
        """The whole conversation, (T,) int64."""
        return np.concatenate(self.parts)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Patches of each frame: rows, columns."""
        return [(rows, columns) for _, rows, columns in self.frames]

    @property
    def ends(self) -> np.ndarray:
        """Where each part ends in `ids`."""
        return np.cumsum([len(part) for part in self.parts])

    def embeds(self, token_rows: np.ndarray, frames: list[np.ndarray]) -> np.ndarray:
        """Token embeddings (T, W) with the frames' in the places of image_pad."""
        embeds = token_rows.copy()
        embeds[self.ids == self.image_pad] = np.concatenate(frames)
        return embeds

    def appends(self, token_rows: np.ndarray, frames: list[np.ndarray]) -> list[Append]:
        """The parts as the decoder takes them."""
        return self.parted(self.embeds(token_rows, frames))

    def parted(self, rows: np.ndarray) -> list[Append]:
        """What belongs to each token, (T, W), by part."""
        positions = self.positions
        bounds = zip([0, *self.ends[:-1]], self.ends, strict=True)
        return [Append(rows[first:last], positions[:, first:last]) for first, last in bounds]

    @property
    def positions(self) -> np.ndarray:
        """m-RoPE positions (3, T) of `ids`, counted without transformers."""
        ids, parts, start, at = self.ids, [], 0, 0
        merged = iter([(rows // self.merge_size, columns // self.merge_size) for rows, columns in self.grids])
        while at < len(ids):
            if ids[at] == self.image_pad:
                rows, columns = next(merged)
                parts.append(image_positions(start, rows, columns))
                start, at = start + max(rows, columns), at + rows * columns
            else:
                parts.append(text_positions(start, 1))
                start, at = start + 1, at + 1
        return np.concatenate(parts, axis=1)


def split_frames(frames: Sequence[np.ndarray], probes: Sequence[Probe]) -> list[list[np.ndarray]]:
    """What was computed of the frames of all `probes`, one behind another, by probe."""
    left = iter(frames)
    return [[next(left) for _ in probe.frames] for probe in probes]


def build_probe(preprocess: PreprocessConfig, tokens: TokenIds, tokenizer_json: bytes) -> Probe:
    """The probe for one model."""
    frames = [_patches(picture, preprocess) for picture in probe_pictures(preprocess)]
    visual_tokens = [rows * columns // preprocess.merge_size**2 for _, rows, columns in frames]
    parts = _conversation(tokens, tokenizer_json, visual_tokens)
    return Probe(frames, parts, tokens.image_pad, preprocess.merge_size)


def probe_pictures(preprocess: PreprocessConfig) -> list[np.ndarray]:
    """The probe's frames as (H, W, 3) uint8, of the sizes that the model takes."""
    return [_picture(*size, preprocess) for size in FRAME_SIZES]


def _patches(picture: np.ndarray, preprocess: PreprocessConfig) -> tuple[np.ndarray, int, int]:
    return patchify(picture, preprocess), *grid_of(picture.shape[0], picture.shape[1], preprocess)


def _picture(height: int, width: int, preprocess: PreprocessConfig) -> np.ndarray:
    """Crossing bands of colour with a fine grain."""
    height, width = smart_resize(height, width, preprocess)
    y, x = np.mgrid[0:height, 0:width]
    grain = (x * 7 + y * 13) % 17
    bands = [(_triangle(x + y // 2, 40 + 25 * c) + _triangle(y, 70 - 15 * c)) // 2 + grain for c in range(3)]
    return np.minimum(np.stack(bands, axis=-1), 255).astype(np.uint8)


def _triangle(values: np.ndarray, period: int) -> np.ndarray:
    return np.abs(values % (2 * period) - period) * 235 // period


def _conversation(tokens: TokenIds, tokenizer_json: bytes, visual_tokens: list[int]) -> list[np.ndarray]:
    """Token ids as the runtime appends them: turns as whole prompts, and a reply one token at a time."""
    encode = encoder(tokenizer_json)
    closing = [tokens.im_end, *encode("\n")]
    parts, front = [], encode(STREAMO.system_text())
    for t, count in enumerate(visual_tokens):
        before, after = STREAMO.turn_text(t, QUESTION if t == 1 else "")
        parts.append([*front, *encode(before), *[tokens.image_pad] * count, *encode(after)])
        front = [*(tokens.silence if t == 0 else tokens.standby), *closing]
    parts += [[token] for token in [*tokens.response, *encode(REPLY)]]
    return [np.array(part, np.int64) for part in parts]

"""The sizes that engines are built for, by the graphs' inputs.

Owns the least, the usual and the most of each symbolic size. Knows the contract's names, and no TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge import contract
from edge.contract import Manifest
from edge.decoder import MAX_PREFILL_TOKENS
from edge.errors import EngineError
from edge.questions import MAX_OPEN_QUESTIONS

MOST_CACHED_TOKENS = 1 << 16
"""Rows of the KV cache that an engine is built for; the cache itself is allocated at the start of a run."""
USUAL_CACHED_TOKENS = 1 << 14
USUAL_NEW_TOKENS = 144
"""Of a turn: a frame of 128 visual tokens and its text."""
MOST_RUNS = MAX_OPEN_QUESTIONS + 2
"""Of the window: its open questions and two more. TensorRT reserves scratch memory for each, times the longest part of
a prompt: 234 MiB for all of them with the 3B, 409 MiB with the 7B."""

Range = tuple[int, int, int]
"""Least, usual and most."""
Shape = Sequence[int]
TableWords = Callable[[int, int, int], int]
"""Words of an attention table: (new tokens, capacity, spans) -> int32 words."""


@dataclass(frozen=True)
class Profile:
    """One of an engine's ways to be used.

    Attributes:
      sizes: range of each symbolic size.
      axes: by input, its dimensions: the name of a size, or a number.
    """

    name: str
    sizes: dict[str, Range]
    axes: dict[str, tuple[int | str, ...]]

    def shapes(self, name: str, found: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Least, usual and most of input `name`, which the parsed graph has with shape `found`, -1 where it is open.

        Raises:
          EngineError: the graph has an input that this version does not know.
        """
        axes = self.axes.get(name)
        if axes is None or len(axes) != len(found):
            raise EngineError(
                f"The graph takes `{name}` with shape {tuple(found)}, which this version does not know",
                hint="Export the checkpoint again with this version of streamo-edge",
            )
        columns = [
            self.sizes[axis] if isinstance(axis, str) else (size, size, size)
            for axis, size in zip(axes, found, strict=True)
        ]
        least, usual, most = zip(*columns, strict=True)
        return least, usual, most


def vision_profiles(manifest: Manifest) -> list[Profile]:
    """For frames of every size that the bundle takes."""
    most = manifest.max_visual_tokens * manifest.preprocess.merge_size**2
    sizes = {"P": (manifest.preprocess.merge_size**2, most, most)}
    rows: tuple[int | str, ...] = ("P", -1)
    axes = {contract.PATCHES: rows, contract.VISION_COS: rows, contract.VISION_SIN: rows}
    return [Profile("frame", sizes, {**axes, contract.WINDOW_MASK: ("P", "P")})]


def decoder_profiles(manifest: Manifest, table_words: TableWords) -> list[Profile]:
    """For one token, and for a turn or another part of a prompt."""
    return [
        _decoder_profile(manifest, "token", (1, 1, 1), table_words),
        _decoder_profile(manifest, "turn", (2, USUAL_NEW_TOKENS, MAX_PREFILL_TOKENS), table_words),
    ]


def _decoder_profile(manifest: Manifest, name: str, tokens: Range, table_words: TableWords) -> Profile:
    capacity = (1, USUAL_CACHED_TOKENS, MOST_CACHED_TOKENS)
    words = [table_words(t, c, contract.MOST_SPANS) for t, c in zip(tokens, capacity, strict=True)]
    sizes = {"T": tokens, "C": capacity, "R": (1, 1, MOST_RUNS), "W": (words[0], words[1], words[2])}
    new: tuple[int | str, ...] = ("T", -1)
    axes: dict[str, tuple[int | str, ...]] = {
        contract.INPUTS_EMBEDS: new,
        contract.ROPE_COS: new,
        contract.ROPE_SIN: new,
        contract.ATTENTION_TABLE: ("W",),
        contract.RUN_COS: ("R", -1),
        contract.RUN_SIN: ("R", -1),
        contract.SLOT_COS: ("C", -1),
        contract.SLOT_SIN: ("C", -1),
    }
    for layer in range(manifest.decoder_facts.layers):
        axes[contract.key_cache_name(layer)] = axes[contract.value_cache_name(layer)] = (-1, -1, "C", -1)
        axes[contract.key_scales_name(layer)] = axes[contract.value_scales_name(layer)] = (-1, -1, "C")
    return Profile(name, sizes, axes)

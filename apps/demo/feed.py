"""Makes training batches: streams of equal duration side by side, and crowded pictures.

Owns padding. A batch's index decides all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apps.demo.conversation import IGNORED, encode
from apps.demo.samples import FIRST_TRAINING_SEED, WHOLE_MIX, Mix, draw_crowd, draw_sample
from edge.prompt import END_OF_TEXT

PAD_MULTIPLE = 64
SEEDS_PER_BATCH = 256


@dataclass(frozen=True)
class Plan:
    """What one step trains on: `streams` of `turns` seconds each, and `crowds` single pictures."""

    streams: int
    turns: int
    crowds: int = 0
    plain: bool = False
    mix: Mix = WHOLE_MIX


def stream_batch(seed: int, plan: Plan) -> dict[str, np.ndarray]:
    """Streams of equal duration, padded on the right to equal length.

    Returns:
      frames (B, T, 84, 140, 3), cells (B, T, 15, 5), events, asked (B, T, 6), places (B, T, 12), uint8; ids, target,
      tags (B, S), positions (3, B, S), decide (B, T), all int32.
    """
    samples = [draw_sample(seed + i, plan.turns, plain=plan.plain, mix=plan.mix) for i in range(plan.streams)]
    longest = max(len(sample.talk.ids) for sample in samples)
    length = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = np.full((plan.streams, length), encode(END_OF_TEXT)[0], np.int32)
    target = np.full((plan.streams, length), IGNORED, np.int32)
    tags = target.copy()
    positions = np.zeros((3, plan.streams, length), np.int32)
    for row, sample in enumerate(samples):
        count = len(sample.talk.ids)
        ids[row, :count], target[row, :count] = sample.talk.ids, sample.talk.target
        positions[:, row, :count], tags[row, :count] = sample.talk.positions, sample.talk.tags
    batch = {"ids": ids, "target": target, "tags": tags, "positions": positions}
    for name in ("frames", "cells", "events", "places", "asked"):
        batch[name] = np.stack([getattr(sample, name) for sample in samples])
    batch["decide"] = np.stack([sample.talk.decide for sample in samples])
    return batch


def make_batch(index: int, plan: Plan) -> dict[str, np.ndarray]:
    """The batch of an index; crowded pictures come as "crowd_frames" and "crowd_cells"."""
    seed = FIRST_TRAINING_SEED + index * SEEDS_PER_BATCH
    batch = stream_batch(seed, plan) if plan.streams else {}
    if plan.crowds:
        pairs = [draw_crowd(seed + i) for i in range(plan.crowds)]
        batch["crowd_frames"] = np.stack([pair[0] for pair in pairs])
        batch["crowd_cells"] = np.stack([pair[1] for pair in pairs])
    return batch

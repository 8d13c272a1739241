"""Conversations go side by side through transformers' layers, each read once, and come out as of its own forward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from export.checkpoint import Checkpoint
from export.converse import Spelling, converse
from export.expected import compute_expected
from export.reference import Reference
from export.source import open_source
from export.tensor_names import TEXT
from export.turns import Clip

torch = pytest.importorskip("torch")
LAYERS = 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A checkpoint, and transformers' own model of it."""
    folder = tmp_path_factory.mktemp("reference")
    model = write_checkpoint(folder, layers=LAYERS)
    return open_source(folder), model


def test_what_comes_out_is_what_transformers_own_forward_gives(written: tuple[Any, Any]) -> None:
    source, model = written
    reference, random = Reference(source.checkpoint), np.random.default_rng(0)
    sequences = []
    for length in (40, 7, 1):
        embeds = random.standard_normal((length, source.checkpoint.facts.decoder.hidden_size), np.float32)
        positions = np.sort(random.integers(0, 60, (3, length)), axis=1)
        sequences.append((embeds, positions))
    for found, (embeds, positions) in zip(reference.hidden(sequences), sequences, strict=True):
        own = torch.from_numpy(embeds)[None], torch.from_numpy(positions)[:, None]
        with torch.inference_mode():
            expected = model.model.language_model(inputs_embeds=own[0], position_ids=own[1]).last_hidden_state[0]
        np.testing.assert_allclose(found, expected, atol=2e-5 * expected.abs().max())


def test_probe_and_held_out_turns_take_one_reading_of_the_checkpoint(
    written: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = written
    frames = [np.full((56, 84, 3), level, np.uint8) for level in (0, 90, 180)]
    clips = [Clip(f"clip {count}", frames[:count], {0: "What?"}, held_out=True) for count in (1, 2, 3)]
    monkeypatch.setattr("export.converse.MAX_REPLY_TOKENS", 2)
    talks = converse(source.checkpoint, Spelling(source.tokens, source.tokenizer, source.preprocess), clips)
    alone = [compute_expected(source.checkpoint, source.probe, [talk]) for talk in talks]
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def count(self: Checkpoint, name: str) -> np.ndarray:
        reads[name] += 1
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", count)
    together = compute_expected(source.checkpoint, source.probe, talks)
    layers = {name: times for name, times in reads.items() if name.startswith(f"{TEXT}layers.")}
    assert len(layers) == LAYERS * 12 and set(layers.values()) == {1}
    for found, one in zip(together.held_out, alone, strict=True):
        np.testing.assert_allclose(found, one.held_out[0], atol=1e-5 * np.abs(found).max())

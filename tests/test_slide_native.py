"""The same claims with the real kernels: the demonstration's model sliding for a long time on its native graph."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import relative_error
from scripted import reply_ids
from witness import Witness

import edge.slide
from edge.backends import evicts_in_place
from edge.backends.ort import OrtBackend
from edge.bundle import Bundle
from edge.session import StreamSession

GRID = (3, 5)
TURNS = 400


class OpenedBackend(OrtBackend):
    """The backend with its float32 caches within reach."""

    def cache_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        arrays = list(self.cache.values())
        return [(keys[0], values[0]) for keys, values in zip(arrays[::2], arrays[1::2], strict=True)]


@pytest.fixture(scope="module")
def native_bundle(demo_bundle: Bundle) -> Bundle:
    if not evicts_in_place("cpu", demo_bundle):
        pytest.skip("the native kernels are not built")
    return demo_bundle


def session_of(bundle: Bundle) -> tuple[StreamSession, Witness]:
    said = ["</Silence>", "</Silence>", "</Standby>", "</Silence>", "</Response> There are 2 shapes."]
    witness = Witness(bundle, [reply_ids(bundle, reply) for reply in said], GRID, OpenedBackend(bundle, threads=1))
    return StreamSession(bundle, backend=witness, policy="slide", window_turns=6), witness


def test_sliding_gives_the_logits_of_a_fresh_cache_however_long_the_stream(native_bundle: Bundle) -> None:
    session, witness = session_of(native_bundle)
    facts = native_bundle.manifest.decoder_facts
    fresh = OpenedBackend(native_bundle, threads=1)
    frames = np.random.default_rng(0).integers(0, 256, (8, 28 * GRID[0], 28 * GRID[1], 3), np.uint8)
    session.ask("Describe each event when it ends.")
    errors = []
    for t in range(TURNS):
        if t == 20:
            session.ask("Is the light on?")
        witness.watching = t < 10 or t % 50 in (0, 24)
        session.push(frames[t % 8], t)
        assert session.kv_tokens <= session.kv_capacity_tokens
        if witness.watching:
            errors.append(
                relative_error(
                    witness.logits, witness.logits_of_a_fresh_cache(fresh, facts.rope_theta, facts.mrope_section)
                )
            )
    assert session.rotated_position > 10 * session.position
    assert max(errors) <= 1e-4, errors


def test_rebasing_changes_no_logits(native_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, often = session_of(native_bundle), session_of(native_bundle)
    frame = np.full((28 * GRID[0], 28 * GRID[1], 3), 90, np.uint8)
    for t in range(60):
        for session, _ in (plain, often):
            if t == 3:
                session.ask("Is the light on?")
        plain[0].push(frame, t)
        with monkeypatch.context() as patch:
            patch.setattr(edge.slide, "REBASE_POSITION", 700)
            often[0].push(frame, t)
        assert relative_error(often[1].logits, plain[1].logits) <= 1e-4
    assert often[0].rotated_position < 1000 < plain[0].rotated_position

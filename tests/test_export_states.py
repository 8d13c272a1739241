"""State tokens on their whole way: as tokens of their own, spelled in pieces, and with a tokenizer of another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scripted import reply_ids
from tiny_checkpoint import SPECIAL_TOKENS, write_checkpoint, write_tokenizer

from edge.backends.fake import ScriptedBackend
from edge.bundle import Bundle, open_bundle
from edge.clock import FakeClock
from edge.errors import CheckpointError
from edge.session import StreamSession
from edge.turn import TurnState
from export.api import export_checkpoint

FRAME = np.zeros((56, 56, 3), np.uint8)
REPLIES = ["</Silence>", "</Standby>", "</Response> a cup", "</Silence>"]


@pytest.fixture(scope="module", params=["tokens", "pieces"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "checkpoint", heads=2, head_dim=32)
    if request.param == "pieces":
        write_tokenizer(folder / "checkpoint", SPECIAL_TOKENS[:8])
        (folder / "checkpoint" / "streamo.json").write_text('{"spelled_states": true}')
    manifest = export_checkpoint(folder / "checkpoint", folder / "bundle")
    assert manifest.parity["passed"]
    assert (len(manifest.tokens.response) == 1) is (request.param == "tokens")
    return open_bundle(folder / "bundle")


def test_an_exported_bundle_reads_the_three_states(bundle: Bundle) -> None:
    backend = ScriptedBackend(bundle.manifest, [reply_ids(bundle, reply) for reply in REPLIES])
    session = StreamSession(bundle, backend=backend, clock=FakeClock())  # type: ignore[arg-type]
    session.ask("What is there?")
    turns = [session.push(FRAME, t) for t in range(len(REPLIES))]
    expected = [TurnState.SILENCE, TurnState.STANDBY, TurnState.RESPONSE, TurnState.SILENCE]
    assert [turn.state for turn in turns] == expected
    assert turns[2].text == "a cup" and not any(turn.off_protocol for turn in turns)


def test_an_exported_bundle_runs_with_its_own_graphs(bundle: Bundle) -> None:
    session = StreamSession(bundle, max_reply_tokens=4)
    session.ask("What is there?")
    tokens = []
    for t in range(3):
        assert session.push(FRAME, t).logits is not None
        tokens.append(session.kv_tokens)
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("key", ["image_token_id", "vision_start_token_id"])
def test_a_tokenizer_of_another_model_is_refused_by_its_ids(tmp_path: Path, key: str) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config[key] -= 100
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    message = rf"gives `<\|.*\|>` the id \d+, `config.json` key `{key}` is {config[key]}"
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()

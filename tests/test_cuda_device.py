"""The CUDA backend on a GPU: `pytest -m gpu`. Needs onnxruntime-gpu, the GPU kernels' archives, and the demo extra."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.demo import CHECKPOINT
from apps.demo.world import make_demo_stream
from edge import StreamSession
from edge.backends import load_backend
from edge.backends.cuda_provider import check_provider
from edge.backends.step_graphs import NO_GRAPH, StepGraphs
from edge.bundle import Bundle, open_bundle
from edge.errors import BackendError
from edge.first_run import compare_turns
from edge.gpu import device_count
from edge.stored_turns import read_stored_turns
from edge.turn import Turn

pytestmark = pytest.mark.gpu

SECONDS = 40
MANY_TURNS = 10_000


@pytest.fixture(scope="module", autouse=True)
def provider() -> None:
    """Skips where there is no GPU, or no ONNX Runtime for it; what goes wrong with both is no reason to skip."""
    try:
        device_count()
        check_provider()
    except BackendError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from apps.demo.bundle import RECORDED_REFERENCE
    from export.api import export_checkpoint

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_checkpoint(CHECKPOINT, folder, weights=request.param, reference=RECORDED_REFERENCE)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Iterator[Any]:
    yield load_backend("cuda", bundle, require_gpu=True, check=False)


def turns(bundle: Bundle, backend: Any) -> list[Turn]:
    stream = make_demo_stream(11, SECONDS)
    session = StreamSession(bundle, backend=backend, window_turns=20, check_first_run=False)
    found = []
    for t in range(SECONDS):
        if t in stream.questions:
            session.ask(stream.questions[t])
        found.append(session.push(stream.render(t), t))
    return found


def test_the_stored_turns_come_out_as_where_the_bundle_was_exported(bundle: Bundle, backend: Any) -> None:
    stored = read_stored_turns(bundle.file(bundle.manifest.stored_turns))
    found = compare_turns(bundle, backend, stored)
    print(found.figures)
    assert found.passed, found.beyond


def test_the_demonstration_has_the_states_and_texts_of_the_cpu(bundle: Bundle, backend: Any) -> None:
    on_gpu, on_cpu = turns(bundle, backend), turns(bundle, "cpu")
    assert [(turn.state, turn.text) for turn in on_gpu] == [(turn.state, turn.text) for turn in on_cpu]


def test_the_same_stream_gives_the_same_bits_again(bundle: Bundle, backend: Any) -> None:
    first, second = turns(bundle, backend), turns(bundle, backend)
    for one, other in zip(first, second, strict=True):
        assert (one.logits is None) == (other.logits is None)
        assert one.logits is None or other.logits is None or np.array_equal(one.logits, other.logits)


def test_recorded_steps_give_the_bits_of_launched_ones(
    bundle: Bundle, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [notice for notice in backend.notices if "does not record" in notice]
    repeated = turns(bundle, backend)
    assert backend._graphs._numbers
    monkeypatch.setattr(StepGraphs, "number", lambda *_: NO_GRAPH)
    for one, other in zip(repeated, turns(bundle, backend), strict=True):
        assert one.text == other.text and np.array_equal(np.asarray(one.logits), np.asarray(other.logits))


LOSE_IT = """
import ctypes, sys
from apps.cli.main import main
from edge.backends.cuda import CudaBackend

encode, frames = CudaBackend.encode, []

def failing(self, *arguments):
    frames.append(1)
    if len(frames) == 2:
        nowhere = ctypes.c_void_p(16)
        self.gpu.launch("sample_chunks", (1,), nowhere, nowhere, nowhere, 2048, stream=self._stream)
    return encode(self, *arguments)

CudaBackend.encode = failing
sys.exit(main(sys.argv[1:]))
"""


def test_a_lost_device_ends_the_command_with_70_and_serves_no_further_turn(bundle: Bundle, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    words = ["run", bundle.path, "--source", "synthetic:table?seconds=9", "--ask", "What happens?", "--pace", "fast",
             "--backend", "cuda", "--skip-parity", "--every-turn", "--output", events]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LOSE_IT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 70, done.stderr
    assert "Restart this process" in done.stderr and "Traceback" not in done.stderr
    assert events.read_text().count('"turn.state"') == 1


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_turns(bundle: Bundle, backend: Any) -> None:
    session = StreamSession(bundle, backend=backend, window_turns=20, max_reply_tokens=4)
    session.ask("What happens?")
    frame, free, resident = np.zeros((140, 252, 3), np.uint8), [], []
    for t in range(MANY_TURNS):
        session.push(frame, t)
        if t % 1000 == 999:
            free.append(backend.free_bytes())
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert free[0] - min(free[1:]) < 8 << 20
    assert max(resident[1:]) - resident[0] < 20 << 20

"""What ONNX Runtime cannot do is told as one of our errors, before it hurts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.backends.ort import OrtBackend
from edge.bundle import Bundle, open_bundle
from edge.errors import BackendError, MemoryBudgetError
from edge.session import StreamSession


def test_a_window_that_memory_cannot_hold_is_refused_with_both_numbers(demo_bundle: Bundle) -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs \d+ MiB .* \d+ MiB is free") as caught:
        OrtBackend(demo_bundle).allocate_cache(10**8)
    assert caught.value.exit_code == 5


def test_a_graph_that_does_not_load_names_the_file_and_the_version(demo_bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime

    folder = Path(shutil.copytree(demo_bundle.path, tmp_path / "bundle"))
    for graph in folder.glob("decoder*.onnx"):
        graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(BackendError, match=rf"{onnxruntime.__version__}.*decoder(\.native)?\.onnx"):
        OrtBackend(open_bundle(folder, verify=False))


def test_one_thread_and_two_give_the_same_stream(demo_bundle: Bundle) -> None:
    import numpy as np

    frame = np.random.default_rng(0).integers(0, 256, (84, 140, 3), np.uint8)
    logits = []
    for threads in (1, 2):
        session = StreamSession(demo_bundle, threads=threads, max_reply_tokens=4)
        session.ask("What happens?")
        turn = session.push(frame, 0)
        assert turn.logits is not None
        logits.append(turn.logits)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)

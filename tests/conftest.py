"""What all tests share: quiet libraries, no network, and the demonstration's bundle, made once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on the CPU; Triton asks once, when it is imported

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from apps.demo import CHECKPOINT  # noqa: E402
from edge.bundle import Bundle, open_bundle  # noqa: E402


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped checkpoint, exported in float32 by our own export stage."""
    pytest.importorskip("onnx")
    from export.api import export_checkpoint

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_checkpoint(CHECKPOINT, folder, weights="fp32")
    return open_bundle(folder)

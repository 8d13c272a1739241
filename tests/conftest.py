"""What all tests share: quiet libraries, no network, and the demonstration's bundle, made once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU run only where they are asked for: `pytest -m gpu`."""
    if "gpu" in str(config.getoption("-m", default="")):
        return
    skip = pytest.mark.skip(reason="needs a GPU: pytest -m gpu")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of bundles stays with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped checkpoint, exported in float32 by our own export stage."""
    pytest.importorskip("onnx")
    from export.api import export_checkpoint

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_checkpoint(CHECKPOINT, folder, weights="fp32")
    return open_bundle(folder)

"""Starting costs little: `import edge` and `streamo-edge --help` load no heavy package and are quick."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "cv2", "PIL", "tokenizers", "rich", "safetensors"}
COMMANDS = ("demo", "export", "inspect", "run", "eval", "bench")


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after `code`."""
    program = (
        "import contextlib, io, json, sys\n"
        f"with contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout))


def seconds_of(*arguments: str) -> float:
    """Median wall time of five runs of this interpreter, less that of an interpreter that does nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def once(*words: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, cwd=ROOT, check=True, env=environment)
        return time.perf_counter() - start

    once(*arguments)
    return statistics.median(once(*arguments) for _ in range(5)) - statistics.median(
        once("-c", "pass") for _ in range(3)
    )


def test_importing_edge_loads_no_heavy_package():
    assert not loaded_after("import edge") & (HEAVY | {"numpy"})


def test_the_names_of_edge_load_no_heavy_package_either():
    code = "import edge; edge.StreamSession, edge.open_bundle, edge.Sampling, edge.Turn, edge.EdgeError"
    assert not loaded_after(code) & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_heavy_package(command):
    code = f"from apps.cli.main import main; assert main(['{command}', '--help']) == 0"
    assert not loaded_after(code) & (HEAVY | {"numpy"})


def test_importing_edge_takes_under_300_ms():
    assert seconds_of("-c", "import edge") < 0.3


def test_the_help_text_appears_in_under_500_ms():
    assert seconds_of("-m", "apps.cli", "--help") < 0.5

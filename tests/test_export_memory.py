"""Export holds one tensor at a time: its peak memory does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_config, write_large_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, sys
from export.api import export_checkpoint
manifest = export_checkpoint(sys.argv[1], sys.argv[2], weights=sys.argv[3])
# Not getrusage: its peak is handed down from the process that started this one.
peak_kib = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak_bytes = int(peak_kib) * 1024
print(json.dumps({"peak_bytes": peak_bytes, "parity": manifest.parity}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """300 MB in bfloat16, 600 MB in the float32 that an export to fp32 writes and PyTorch computes with."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    config = tiny_config(
        heads=16, kv_heads=4, head_dim=64, layers=7, intermediate_size=3072, vocabulary=32000, tied=False,
        vision_depth=4, vision_hidden=640, vision_heads=8, vision_intermediate=1728,
    )  # fmt: skip
    return folder, write_large_checkpoint(folder, config)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_peak_memory_stays_under_twice_the_largest_tensor_and_a_gigabyte(
    large: tuple[Path, int], tmp_path: Path, weights: str
) -> None:
    folder, largest_bytes = large
    assert (folder / "model.safetensors").stat().st_size > 250e6
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "bundle"), weights],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["parity"]["passed"]
    assert report["peak_bytes"] <= 2 * largest_bytes + 10**9, f"{report['peak_bytes'] / 1e6:.0f} MB"

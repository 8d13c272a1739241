"""`streamo-edge bench gpu` on a driver that only pretends: the figures mean nothing, but all of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

from apps.cli.main import main

pytestmark = [needs_kernels, needs_triton, needs_compiler]


def test_every_case_runs_in_a_graph_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cuda = FakeCuda(tmp_path, multiprocessors=1)
    with cuda.in_use():
        assert main(["bench", "gpu", "--small", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["gpu"]["name"] == "Fake GPU 0" and result["copy_gbps"] > 0
    assert [row["what"] for row in result["rows"]] == ["matmul"] * 2 + ["attention"] * 2
    assert all(row["same_bits"] and row["us"] > 0 and row["of_copy"] > 0 for row in result["rows"])
    assert cuda["blocks"] == cuda["graphs"] == cuda["events"] == cuda["streams"] == 0


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "none.so"))
    assert main(["bench", "gpu", "--json"]) == 1
    said = capsys.readouterr()
    assert "GPU driver cannot be loaded" in said.err and "hint:" in said.err and not said.out

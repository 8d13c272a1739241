"""`streamo-edge bench gpu` on a driver that only pretends: the figures mean nothing, but all of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

from apps.bench.kernel_cases import AttentionCase, Piece
from apps.cli.main import main

pytestmark = [needs_kernels, needs_triton, needs_compiler]


def test_every_case_runs_in_a_graph_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cuda = FakeCuda(tmp_path, multiprocessors=1)
    with cuda.in_use():
        assert main(["bench", "gpu", "--small", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["gpu"]["name"] == "Fake GPU 0" and result["copy_gbps"] > 0
    assert [row["what"] for row in result["rows"]] == ["matmul"] * 2 + ["attention"] * 2 + ["turn"]
    assert result["rows"][0]["goals"]["of_copy"]["wanted"] == 0.7
    assert result["rows"][-1]["goals"]["turns_a_second"]["found"] > 0
    assert all(row["same_bits"] and row["us"] > 0 and row["of_copy"] > 0 for row in result["rows"])
    assert cuda["blocks"] == cuda["graphs"] == cuda["events"] == cuda["streams"] == 0


def test_a_turn_goes_through_all_of_its_kernels_and_stays_finite(tmp_path: Path):
    from apps.bench.gpu_turn import SMALL, _Turn

    fake = FakeCuda(tmp_path, multiprocessors=1)
    with fake.open() as gpu:
        turn = _Turn(gpu, SMALL)
        allocated = fake["blocks"]
        logits = gpu.numpy(turn.run(None))
        assert logits.shape == (1, SMALL.vocabulary) and np.isfinite(logits).all() and logits.std() > 0.1
        once, used = fake["blocks"], {name for name, _ in fake.launched}
        np.testing.assert_array_equal(gpu.numpy(turn.run(None)), logits)
        assert once > allocated and fake["blocks"] == once, "a recorded turn must not allocate"
    assert {"window_attention_d32", "append_int8_d64_t16", "sample_chunks", "product_row_w8a8_s16", "norm"} <= used


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_compared_with_computes_attention(tokens: int):
    torch = pytest.importorskip("torch")
    from apps.bench.gpu_sdpa import forms

    case = AttentionCase("compared", 6, 2, 16, tokens, (Piece(40),))
    queries, keys, values = (torch.randn(3, heads, rows, 16) for heads, rows in ((6, tokens), (2, 45), (2, 45)))
    keys, values = keys[:, :, : 40 + tokens], values[:, :, : 40 + tokens]
    scores = queries.double() @ keys.double().repeat_interleave(3, 1).transpose(-1, -2) / 4
    seen = torch.arange(40 + tokens) <= 40 + torch.arange(tokens)[:, None]
    values_of_heads = values.double().repeat_interleave(3, 1)
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values_of_heads
    unmasked = scores.softmax(-1) @ values_of_heads  # the few new tokens all see each other
    found = {name: form(queries, keys, values) for name, form in forms(case).items()}
    torch.testing.assert_close(found["heads by group"].double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["groups as rows"].double(), unmasked, atol=1e-5, rtol=1e-5)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "none.so"))
    assert main(["bench", "gpu", "--json"]) == 1
    said = capsys.readouterr()
    assert "GPU driver cannot be loaded" in said.err and "hint:" in said.err and not said.out

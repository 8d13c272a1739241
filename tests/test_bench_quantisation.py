"""`bench quantisation`: its files, and what is said where they cannot be written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apps.bench.machine import machine_card
from apps.cli.main import main

ROW = {"name": "int4 gptq", "method": "gptq", "bundle_bytes": 1, "decoder_bytes": 1, "kl_mean": 1e-3, "state_flips": 0}


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"machine": machine_card(1), "rows": [ROW]}
    monkeypatch.setattr("apps.bench.quantisation.measure", lambda *_, **__: result)


def test_the_table_is_written_as_markdown_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, plot = tmp_path / "table.md", tmp_path / "plot.png"
    assert main(["bench", "quantisation", "--markdown", str(table), "--plot", str(plot)]) == 0
    assert "| int4 gptq | 0.00 |" in table.read_text() and plot.stat().st_size > 0


@pytest.mark.parametrize("option", ["--markdown", "--plot", "--workdir"])
def test_a_file_that_cannot_be_written_is_named(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "result.png"
    assert main(["bench", "quantisation", option, str(path)]) == 1
    assert f"error: `{path}` cannot be written: Not a directory" in capsys.readouterr().err


def test_a_plot_says_which_extra_brings_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "quantisation", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "needs the package `matplotlib`" in (said := capsys.readouterr().err) and "'.[test]'" in said

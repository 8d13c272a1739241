"""`--weights` and `--kv` on the command line: what they export, and where they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.cli.main import main
from apps.demo import bundle as demo
from edge.bundle import Bundle


@pytest.mark.parametrize("option", [("--weights", "int8"), ("--kv", "int8")])
def test_precisions_of_a_bundle_that_has_its_own_are_refused(
    demo_bundle: Bundle, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert main(["eval", "demo", "--bundle", str(demo_bundle.path), *option]) == 2
    assert "has its own precisions" in capsys.readouterr().err


def test_the_shipped_model_is_exported_once_for_each_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain, quantised = demo.demo_bundle(weights="int4", kv="fp32"), demo.demo_bundle(weights="int4")
    kinds = [json.loads((folder / "manifest.json").read_text()) for folder in (plain, quantised)]
    assert plain != quantised and [set(kind["kv_dtypes"]) for kind in kinds] == [{"float32"}, {"int8"}]
    assert all(kind["parity"]["passed"] and kind["vision"]["weights"] == "int8" for kind in kinds)
    monkeypatch.setattr("export.api.export_checkpoint", lambda *_, **__: pytest.fail("it was there already"))
    assert demo.demo_bundle(weights="int4") == quantised


def test_export_takes_the_kind_of_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = ["export", str(demo.CHECKPOINT), "-o", str(tmp_path / "bundle"), "--kv", "int8", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["kv_dtypes"]) == {"int8"} and document["weights"] == "fp32"

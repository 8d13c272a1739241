"""The demonstration's cached bundle belongs to the code that made it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from apps.demo import bundle
from edge import contract
from export import fingerprint


def test_a_change_of_the_export_or_of_the_contract_asks_for_another_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bundle._fingerprint()
    assert bundle._fingerprint() == before
    shutil.copytree(Path(fingerprint.__file__).parent, tmp_path / "export")
    shutil.copy(str(contract.__file__), tmp_path / "contract.py")
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "export" / "fingerprint.py"))
    monkeypatch.setattr(contract, "__file__", str(tmp_path / "contract.py"))
    assert bundle._fingerprint() == before  # wherever the code lies
    (tmp_path / "export" / "decoder.py").write_text("changed")
    changed = bundle._fingerprint()
    (tmp_path / "contract.py").write_text("changed")
    assert len({before, changed, bundle._fingerprint()}) == 3

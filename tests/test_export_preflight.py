"""What an export says before it starts, and the hashes that it compares."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from apps.bench.qwen_configs import public_config
from apps.cli import export as export_command
from apps.cli.main import main
from edge.errors import CheckpointError, MemoryBudgetError, OutputError
from edge.preprocess import PreprocessConfig
from export import api, preflight
from export.api import export_checkpoint, record_reference
from export.calibration_needs import SYSTEM_TOKENS, TURN_TOKENS, CalibrationNeeds, calibration_needs
from export.checkpoint import Checkpoint
from export.config import facts_from_config
from export.known_hashes import DOWNLOADS, SUMS_FILE, known_hash
from export.partial import disk_free_bytes
from export.plan import NEAREST, make_plan
from export.safetensors_file import TensorEntry
from export.tensor_names import expected_shapes
from export.turns import Clip

SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    write_checkpoint(folder, dtype="bfloat16", vocabulary=4096, tied=False)
    record_reference(folder, folder.parent / "reference.npz")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copy(original.parent / "reference.npz", tmp_path / "reference.npz")
    return Path(shutil.copytree(original, tmp_path / "in" / "checkpoint"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export(folder: Path, **options: object) -> None:
    reference = folder.parent.parent / "reference.npz"
    export_checkpoint(folder, folder.parent.parent / "bundle", reference=reference, **options)  # type: ignore[arg-type]


# Disk and memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_the_size_said_before_is_the_size_written(original: Path, tmp_path: Path, weights: str) -> None:
    needs = api.preflight(original, tmp_path / "bundle", weights=weights)
    assert list(tmp_path.iterdir()) == []
    reference = original.parent / "reference.npz"
    manifest = export_checkpoint(original, tmp_path / "bundle", weights=weights, reference=reference)
    data = sum(facts.bytes for name, facts in manifest.files.items() if not name.endswith((".onnx", ".npz")))
    assert needs.bundle_bytes == pytest.approx(data, rel=0.1)
    assert needs.disk_free_bytes > 0 and needs.layers == 2


def shape_of(size: str) -> Checkpoint:
    config = public_config(size)
    facts = facts_from_config(config)
    shapes = expected_shapes(facts).items()
    entries = {name: TensorEntry(Path("x"), name, "BF16", shape, 0) for name, shape in shapes}
    return Checkpoint(Path("x"), config, "", facts, entries)


def test_a_public_models_needs_are_those_that_were_measured() -> None:
    """3B to int4: 3.46 GB on disk, at most 2.31 GB of memory; the estimate is a little above both."""
    small, large = shape_of("3B"), shape_of("72B")
    plan = make_plan("int4", facts=small.facts.decoder, embedding="fp16")
    assert 3.46e9 < preflight.bundle_bytes(small, plan) < 3.46e9 * 1.06
    assert 2.31e9 < preflight.memory_bytes(small) < 3e9
    assert preflight.memory_bytes(shape_of("7B")) < 4e9
    assert preflight.memory_bytes(large) < 7e9  # by its largest tensor, not by its 147 GB


def clips(count: int = 3, turns: int = 8) -> list[Clip]:
    frames = [np.zeros((336, 560, 3), np.uint8)] * turns
    return [Clip(f"clip {i}", frames, {0: "What?"}) for i in range(count)]


def test_what_turns_take_is_counted_and_grows_with_them_and_the_model() -> None:
    def needs(size: str, method: str = "gptq", count: int = 3) -> CalibrationNeeds:
        plan = make_plan("int4", method=method, facts=models[size].facts.decoder)
        return calibration_needs(models[size], plan, PreprocessConfig(), clips(count))

    models = {size: shape_of(size) for size in ("3B", "7B")}
    small, large, more = needs("3B"), needs("7B"), needs("3B", count=6)
    assert needs("3B", count=0) == CalibrationNeeds()
    assert small.clips == 3 and small.turns == 18  # the last quarter of each is held out
    frame_tokens = small.tokens / small.turns - SYSTEM_TOKENS / 8 - TURN_TOKENS
    assert frame_tokens == pytest.approx(112, abs=1)  # 336x560 pixels are seen as 224x392
    assert small.memory_bytes > 10 * 2048 * 22016  # the widest map alone, as stored, in float32 and written
    assert large.memory_bytes > 1.8 * small.memory_bytes
    assert preflight.memory_bytes(models["7B"], large) < 4e9
    assert (
        more.tokens == 2 * small.tokens and more.memory_bytes > small.memory_bytes > needs("3B", NEAREST).memory_bytes
    )
    assert preflight.memory_bytes(models["3B"], small) > preflight.memory_bytes(models["3B"])


def test_the_tokens_and_the_disk_of_calibration_said_before_are_those_of_the_export(
    original: Path, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"weights": "int4", "clips": clips()}
    needs = api.preflight(original, tmp_path / "bundle", **chosen)
    kept: list[int] = []

    def weigh(stage: str, done: int, total: int) -> None:
        if stage == "decoder":
            kept.append(sum(path.stat().st_size for path in tmp_path.glob(".bundle.partial-*/*.kept")))

    reference = original.parent / "reference.npz"
    manifest = export_checkpoint(original, tmp_path / "bundle", reference=reference, progress=weigh, **chosen)
    facts = manifest.precision.calibration
    assert (needs.calibration_clips, needs.calibration_turns) == (3, facts["turns"])
    assert needs.calibration_tokens == pytest.approx(facts["tokens"], rel=0.6)  # this tokenizer spells every letter
    assert 0.4 < kept[-1] / needs.kept_bytes < 1.1


def test_a_dry_run_says_what_it_would_calibrate_on(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(original), "-o", str(tmp_path / "bundle"), "--weights", "int4", "--dry-run", "--json"]
    assert main([*words, "--calibration", "synthetic:table?seed=3&seconds=8"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert (document["calibration_clips"], document["calibration_turns"]) == (1, 6) and document["kept_bytes"] > 0
    assert "tokens of 6 turns of 1 clips" in err and list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(original), "-o", str(tmp_path / "bundle"), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert document["bundle_bytes"] > 0 and document["memory_bytes"] > 0 and document["known_hashes"] == 0
    assert "Needs about" in err and "of disk" in err and "of memory" in err
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_with_both_numbers(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_command, "available_bytes", lambda: 500_000_000)
    code = main(["export", str(original), "-o", str(tmp_path / "bundle")])
    message = capsys.readouterr().err
    assert code == MemoryBudgetError.exit_code
    assert "takes about 1.1 GB of memory, 500.0 MB are free" in message
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_with_both_numbers_unless_a_leftover_fills_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "parity":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(folder, progress=interrupt)
    target = folder.parent.parent / "bundle"
    _, left = disk_free_bytes(target)
    assert left > 1_000_000
    needed = api.preflight(folder, target).bundle_bytes + (64 << 20)
    monkeypatch.setattr("export.bundle_writer.shutil.disk_usage", lambda path: usage(0, 0, needed - left))
    export(folder)
    monkeypatch.setattr("export.bundle_writer.shutil.disk_usage", lambda path: usage(0, 0, needed - left))
    with pytest.raises(OutputError, match=r"The bundle takes \d+ MB, .* has \d+ MB free"):
        export(folder, overwrite=True)


def test_an_interruption_says_what_is_kept(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.api.prove", interrupt)
    assert main(["export", str(original), "-o", str(tmp_path / "bundle")]) == 130
    assert "are kept; the same command goes on behind them" in capsys.readouterr().err


# Hashes -------------------------------------------------------------------------------------------------------------


def as_sums(folder: Path, name: str, sha: str) -> None:
    (folder / SUMS_FILE).write_text(f"{'0' * 64}  other.bin\n{sha} *{name}\n")


def as_download(folder: Path, name: str, sha: str) -> None:
    record = folder / DOWNLOADS / f"{name}.metadata"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"{'a' * 40}\n{sha}\n{(folder / name).stat().st_mtime + 1}\n")


def as_cache(folder: Path, name: str, sha: str) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (folder / name).rename(blobs / sha)
    (folder / name).symlink_to(blobs / sha)


@pytest.mark.parametrize("record", [as_sums, as_download, as_cache])
def test_a_file_with_another_hash_than_its_record_is_refused_by_name(
    folder: Path, record: Callable[[Path, str, str], None]
) -> None:
    record(folder, SHARD, sha256(folder / SHARD))
    stages: list[str] = []
    export(folder, progress=lambda stage, done, total: stages.append(stage))
    assert "hashes" in stages
    shutil.rmtree(folder.parent.parent / "bundle")
    path = (folder / SHARD).resolve()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of one value
    path.write_bytes(content)
    os.utime(path, ns=times)
    with pytest.raises(CheckpointError, match=f"`{SHARD}` has the SHA-256 .*, expected ") as caught:
        export_checkpoint(folder, folder.parent.parent / "bundle")
    assert caught.value.exit_code == 3
    assert [path.name for path in folder.parent.parent.iterdir() if "bundle" in path.name] == []


def test_a_download_that_was_changed_since_and_other_kinds_of_hashes_say_nothing(folder: Path) -> None:
    as_download(folder, SHARD, "f" * 64)
    assert known_hash(folder / SHARD) == ("f" * 64, "its download")
    record = folder / DOWNLOADS / f"{SHARD}.metadata"
    lines = record.read_text().splitlines()
    for changed in (
        [lines[0], lines[1], "1.0"],  # trained on since
        [lines[0], "f" * 40, lines[2]],  # git's hash of a small file
        [lines[0], lines[1], "yesterday"],
        lines[:1],
        [],
    ):
        record.write_text("\n".join(changed))
        assert known_hash(folder / SHARD) is None
    record.write_bytes(b"\xff\xfe")
    assert known_hash(folder / SHARD) is None

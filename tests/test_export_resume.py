"""An interrupted export leaves no bundle, and the next one with the same inputs goes on behind it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from interruption import assert_same, interrupted_export
from tiny_checkpoint import write_checkpoint

from edge.bundle import open_bundle
from edge.errors import BundleError, OutputError
from export import weight_writer
from export.api import export_checkpoint, record_reference
from export.partial import PartialFolder
from export.quantize import quantize_blocks
from export.resume import JOURNAL_FILE, Journal
from export.weight_store import WeightFile

ROOT = Path(__file__).resolve().parent.parent
POINTS = [("embeddings", 1), ("vision", 2), ("decoder", 1), ("decoder", 3), ("parity", 0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_checkpoint(folder, dtype="bfloat16")
    record_reference(folder, folder.parent / "reference.npz")
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an export that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    export(checkpoint, folder)
    return folder


def export(checkpoint: Path, folder: Path, weights: str = "int4", **options: object) -> None:
    reference = checkpoint.parent / "reference.npz"
    export_checkpoint(checkpoint, folder, weights=weights, reference=reference, **options)  # type: ignore[arg-type]


interrupted = partial(interrupted_export, export)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the size of every matrix piece that is quantised."""
    sizes: list[int] = []

    def count(values: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(values.size)
        return quantize_blocks(values, block, dtype)

    monkeypatch.setattr(weight_writer, "quantize_blocks", count)
    return sizes


def test_two_exports_of_the_same_inputs_are_the_same_file_by_file(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "bundle")
    assert_same(tmp_path / "bundle", whole)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{point[1]}")
def test_an_interrupted_export_goes_on_and_gives_the_same_bundle(
    checkpoint: Path, whole: Path, tmp_path: Path, point: tuple[str, int], quantized: list[int]
) -> None:
    leftover = interrupted(checkpoint, tmp_path / "bundle", point)
    assert not (leftover / "manifest.json").exists()
    with pytest.raises(BundleError):
        open_bundle(leftover)
    before = sum(quantized)
    quantized.clear()
    export(checkpoint, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert_same(tmp_path / "bundle", whole)
    again = sum(quantized)
    quantized.clear()
    export(checkpoint, tmp_path / "other")
    assert before + again == sum(quantized)  # nothing is done twice


def test_an_export_interrupted_again_and_again_arrives(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    for point in POINTS:
        interrupted(checkpoint, tmp_path / "bundle", point)
    export(checkpoint, tmp_path / "bundle")
    assert_same(tmp_path / "bundle", whole)


@pytest.mark.parametrize("changed", ["options", "checkpoint"])
def test_other_inputs_start_afresh_and_remove_the_leftover(
    checkpoint: Path, tmp_path: Path, changed: str, quantized: list[int]
) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "in" / "checkpoint"))
    shutil.copy(checkpoint.parent / "reference.npz", tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    leftover = interrupted(own, out / "bundle", ("decoder", 1))
    if changed == "checkpoint":
        status = (own / "model.safetensors").stat()
        os.utime(own / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    quantized.clear()
    export(own, out / "bundle", weights="int4" if changed == "checkpoint" else "int8")
    assert [path.name for path in out.iterdir()] == ["bundle"] and not leftover.exists()
    afresh = sum(quantized)
    quantized.clear()
    export(own, out / "bundle", weights="int4" if changed == "checkpoint" else "int8", overwrite=True)
    assert sum(quantized) == afresh


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "vision.data"),
        lambda folder: cut(folder / "decoder.data"),
        lambda folder: (folder / "embeddings.bin").unlink(),
        lambda folder: cut(folder / JOURNAL_FILE),
        lambda folder: (folder / JOURNAL_FILE).write_text("[]\n"),
        lambda folder: (folder / JOURNAL_FILE).unlink(),
        lambda folder: (folder / "slice.onnx").write_bytes(b"left by a kill"),
    ],
    ids=["flipped bit", "cut data", "no table", "cut journal", "odd journal", "no journal", "foreign file"],
)
def test_a_damaged_leftover_is_noticed(
    checkpoint: Path, whole: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(interrupted(checkpoint, tmp_path / "bundle", ("decoder", 2)))
    export(checkpoint, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert_same(tmp_path / "bundle", whole)


def test_a_leftover_that_another_process_works_on_is_left_alone(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    leftover = interrupted(checkpoint, tmp_path / "bundle", ("decoder", 1))
    key = leftover.name.partition(".partial-")[2]
    other = PartialFolder(tmp_path / "bundle", key)
    assert other.path == leftover
    export(checkpoint, tmp_path / "bundle")
    assert_same(tmp_path / "bundle", whole)
    assert (leftover / JOURNAL_FILE).exists()
    other.release(keep=True)
    export(checkpoint, tmp_path / "bundle", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_data_file_that_goes_on_with_another_tensor_keeps_what_comes_before(tmp_path: Path) -> None:
    """As after a change that the digest of the inputs does not see."""
    numbers = np.arange(40_000, dtype=np.float32)
    with WeightFile(tmp_path / "data", Journal(tmp_path)) as file:
        file.append("float32", (3,), [numbers[:3]])
        file.append("float32", (40_000,), [numbers])
    with WeightFile(tmp_path / "data", Journal(tmp_path)) as file:
        file.append("float32", (3,), [])
        stored = file.append("float32", (5,), [numbers[:5]])
    with WeightFile(tmp_path / "data", Journal(tmp_path)) as file:
        assert file.append("float32", (3,), []).offset == 0
        assert file.append("float32", (5,), []) == stored
    content = (tmp_path / "data").read_bytes()
    assert content[stored.offset :] == numbers[:5].tobytes() and content[:12] == numbers[:3].tobytes()


# Signals and full disks, in processes of their own ------------------------------------------------------------------

STOPPED = """
import os, signal, sys
from export.api import export_checkpoint
def stop(stage, done, total):
    if (stage, done) == ("decoder", 1): os.kill(os.getpid(), int(sys.argv[4]))
export_checkpoint(sys.argv[1], sys.argv[2], weights="int4", reference=sys.argv[3], progress=stop)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_there_is_no_bundle_and_the_next_export_goes_on(
    checkpoint: Path, whole: Path, tmp_path: Path, number: signal.Signals, quantized: list[int]
) -> None:
    reference = str(checkpoint.parent / "reference.npz")
    command = [sys.executable, "-c", STOPPED, str(checkpoint), str(tmp_path / "bundle"), reference, str(int(number))]
    assert subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode == -number
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".bundle.partial-") and not (leftover / "manifest.json").exists()
    export(checkpoint, tmp_path / "bundle")
    assert_same(tmp_path / "bundle", whole)
    resumed = sum(quantized)
    quantized.clear()
    export(checkpoint, tmp_path / "other")
    assert 0 < resumed < sum(quantized)


def test_a_disk_that_fills_up_midway_is_one_clear_error_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """The largest size of a file stands in for the end of the disk."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    done = subprocess.run(
        [sys.executable, "-m", "apps.cli.main", "export", str(checkpoint), "-o", str(tmp_path / "bundle")],
        cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == OutputError.exit_code, done.stderr
    assert "cannot be written: File too large" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_journal_says_what_was_finished(checkpoint: Path, tmp_path: Path) -> None:
    leftover = interrupted(checkpoint, tmp_path / "bundle", ("decoder", 1))
    lines = [json.loads(line) for line in (leftover / JOURNAL_FILE).read_text().splitlines()]
    assert [line["file"] for line in lines] == ["embeddings.bin", *["vision.data"] * 4, "decoder.data"]
    assert all(line["tensors"] and len(line["sha256"]) == 64 for line in lines)

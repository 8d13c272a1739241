"""An interrupted export that fits weights to turns goes on behind its last finished layer, with the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruption import assert_same, interrupted_export
from tiny_checkpoint import write_checkpoint

from export import calibrate, converse
from export.api import export_checkpoint, record_reference
from export.gptq import gptq
from export.kept import Kept, Record
from export.turns import Clip

ROOT = Path(__file__).resolve().parent.parent
LAYERS, MAPS = 3, 4
SHAPE: dict[str, Any] = {"heads": 4, "kv_heads": 1, "head_dim": 64, "layers": LAYERS, "intermediate_size": 128}
POINTS = [("turns", 4), ("decoder", 1), ("decoder", 3), ("parity", 0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a key bias that makes two of three layers keep an offset."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_checkpoint(folder, dtype="bfloat16", key_bias_norm=605.0, **SHAPE)
    record_reference(folder, folder.parent / "reference.npz")
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an export that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    manifest = export(checkpoint, folder)
    assert manifest.precision.method == "gptq" and manifest.key_offset_layers == (0, 2)
    return folder


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is worked out: a `map` for each one that is rounded, a `talk` for each clip that is talked about."""
    done: list[str] = []

    def rounded(*args: Any) -> Any:
        done.append("map")
        return gptq(*args)

    def talked(self: Any) -> Any:
        done.append("talk")
        return own(self)

    own = converse._Writer.own
    monkeypatch.setattr(calibrate, "gptq", rounded)
    monkeypatch.setattr(converse._Writer, "own", talked)
    yield done


def clips(seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (84, 84, 3)).astype(np.uint8) for _ in range(8)]
    return [Clip("one", frames[:4], {0: "What?"}), Clip("two", frames[4:], {1: "And now?"})]


def export(checkpoint: Path, folder: Path, seed: int = 0, **options: Any) -> Any:
    chosen = {"weights": "int4", "reference": checkpoint.parent / "reference.npz", "allow_mismatch": True, **options}
    return export_checkpoint(checkpoint, folder, clips=clips(seed), **chosen)


interrupted = partial(interrupted_export, export)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{point[1]}")
def test_nothing_that_was_finished_is_done_again(
    checkpoint: Path, whole: Path, tmp_path: Path, point: tuple[str, int], work: list[str]
) -> None:
    interrupted(checkpoint, tmp_path / "bundle", point)
    export(checkpoint, tmp_path / "bundle")
    assert sorted(work) == sorted(["map"] * LAYERS * MAPS + ["talk"] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert_same(tmp_path / "bundle", whole)


@pytest.mark.parametrize("finished", [1, 6], ids=lambda finished: f"after-{finished}-maps")
def test_inside_a_layer_only_that_layer_is_done_again(
    checkpoint: Path, whole: Path, tmp_path: Path, finished: int, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*args: Any) -> Any:
        if len(work) - 2 == finished:  # behind the two talks
            raise KeyboardInterrupt
        return rounded(*args)

    rounded = calibrate.gptq
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrate, "gptq", stopping)
        export(checkpoint, tmp_path / "bundle")
    export(checkpoint, tmp_path / "bundle")
    assert work.count("map") == LAYERS * MAPS + finished % MAPS
    assert_same(tmp_path / "bundle", whole)


def test_interrupted_again_and_again_it_arrives(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    for point in POINTS:
        interrupted(checkpoint, tmp_path / "bundle", point)
    export(checkpoint, tmp_path / "bundle")
    assert_same(tmp_path / "bundle", whole)


def test_a_map_that_got_8_bits_has_them_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "PROMOTED_ABOVE", 0.0)
    chosen = {"layers": {"layers.0.down": "int4", "layers.1.down": "fp16"}}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    interrupted(checkpoint, tmp_path / "one" / "bundle", ("decoder", 2), **chosen)
    manifest = export(checkpoint, tmp_path / "one" / "bundle", **chosen)
    assert [override.weights for override in manifest.precision.overrides].count("int8") == LAYERS * MAPS - 2
    export(checkpoint, tmp_path / "two" / "bundle", **chosen)
    assert_same(tmp_path / "one" / "bundle", tmp_path / "two" / "bundle")


def test_other_clips_start_afresh_and_remove_the_leftover(checkpoint: Path, tmp_path: Path, work: list[str]) -> None:
    leftover = interrupted(checkpoint, tmp_path / "bundle", ("decoder", 2))
    work.clear()
    export(checkpoint, tmp_path / "bundle", seed=1)
    assert sorted(work) == sorted(["map"] * LAYERS * MAPS + ["talk"] * 2) and not leftover.exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "maps"),
    [
        (lambda folder: flip(folder / "calibration.kept"), 3 * MAPS),
        (lambda folder: flip(folder / "decoder.data"), 3 * MAPS),
        (lambda folder: flip(folder / "turns-0.kept"), MAPS),
        (lambda folder: (folder / "calibration.kept.new").write_bytes(b"cut short"), MAPS),
    ],
    ids=["flipped bit", "flipped code", "flipped turn", "unfinished state"],
)
def test_a_damaged_leftover_is_noticed(
    checkpoint: Path, whole: Path, tmp_path: Path, work: list[str], damage: Callable[[Path], object], maps: int
) -> None:
    damage(interrupted(checkpoint, tmp_path / "bundle", ("decoder", 2)))
    work.clear()
    export(checkpoint, tmp_path / "bundle")
    assert work.count("map") == maps
    assert_same(tmp_path / "bundle", whole)


def test_a_layer_whose_outputs_were_not_kept_in_time_is_written_anew(
    checkpoint: Path, whole: Path, tmp_path: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the power fails between the journal's line and the record of what came out of the layer."""

    def stopping(self: Kept, name: str, record: Record) -> None:
        if record.facts.get("layers") == 2:
            raise KeyboardInterrupt
        save(self, name, record)

    save = Kept.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Kept, "save", stopping)
        export(checkpoint, tmp_path / "bundle")
    interrupted(checkpoint, tmp_path / "bundle", ("decoder", 2))
    assert work.count("map") == 3 * MAPS
    export(checkpoint, tmp_path / "bundle")
    assert work.count("map") == 4 * MAPS
    assert_same(tmp_path / "bundle", whole)


def test_what_is_kept_is_found_again_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.int64)}
    kept.save("x", Record({"n": 0.1}, arrays))
    found = kept.load("x")
    assert found is not None and found.facts == {"n": 0.1} and kept.load("y") is None
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for count in range(len(content)):
        path.write_bytes(content[:count])
        assert kept.load("x") is None
    kept.remove()
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import test_calibrated_resume as t
def stop(stage, done, total):
    if (stage, done) == ("decoder", 1): os.kill(os.getpid(), signal.SIGKILL)
t.export(Path(sys.argv[1]), Path(sys.argv[2]), progress=stop)
"""


def test_after_a_kill_the_next_export_goes_on(checkpoint: Path, whole: Path, tmp_path: Path, work: list[str]) -> None:
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / "bundle"), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr[-2000:]
    export(checkpoint, tmp_path / "bundle")
    assert work == ["map"] * (LAYERS - 1) * MAPS
    assert_same(tmp_path / "bundle", whole)

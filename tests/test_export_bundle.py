"""What an export leaves on disk: a whole bundle, the same every time, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_checkpoint import write_checkpoint

from edge import contract
from edge.errors import CheckpointError, OutputError, ParityError, UsageError
from export import bundle_writer, components, graph_check, parity, proof, reference
from export.api import export_checkpoint, record_reference
from export.bundle_writer import BundleWriter

ROOT = Path(__file__).resolve().parent.parent

# Operators that TensorRT 10.1's ONNX parser takes (its operators.md), those of them that a transformer could need.
TENSORRT_OPERATORS = frozenset(
    "Abs Add And Cast Clip Concat Constant ConstantOfShape Cos DequantizeLinear Div Einsum Equal Erf Exp Expand "
    "Flatten Floor Gather Gelu Gemm Greater Identity LayerNormalization Less Log MatMul Max Mean Min Mul Neg "
    "Not Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu "
    "Reshape Round ScatterElements ScatterND Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile TopK "
    "Transpose Trilu Unsqueeze Where".split()
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_checkpoint(folder, dtype="bfloat16")
    return folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_graphs_hold_only_operators_of_tensorrt_and_our_own(checkpoint: Path, tmp_path: Path, weights: str) -> None:
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", weights=weights)
    for file in (contract.VISION_FILE, contract.DECODER_FILE):
        model = onnx.load(tmp_path / "bundle" / file)
        onnx.checker.check_model(str(tmp_path / "bundle" / file), full_check=False)
        own = [node for node in model.graph.node if node.domain == contract.CUSTOM_DOMAIN]
        others = {(node.domain, node.op_type) for node in model.graph.node if node.domain != contract.CUSTOM_DOMAIN}
        assert others <= {("", name) for name in TENSORRT_OPERATORS}
        layers = manifest.decoder_facts.layers if file == contract.DECODER_FILE else 0
        assert [node.op_type for node in own] == [contract.STREAM_ATTENTION] * layers
        assert len(model.functions) == (1 if layers else 0)
        assert model.ir_version == 10 and {i.domain: i.version for i in model.opset_import}[""] == contract.OPSET


def test_the_manifest_describes_every_file_and_is_read_back_the_same(checkpoint: Path, tmp_path: Path) -> None:
    stages = []
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", progress=lambda *step: stages.append(step))
    document = json.loads((tmp_path / "bundle" / contract.MANIFEST_FILE).read_text())
    assert contract.manifest_from_json(document) == manifest
    assert leftovers(tmp_path) == ["bundle"]
    files = sorted([*manifest.files, contract.MANIFEST_FILE])
    assert leftovers(tmp_path / "bundle") == files
    for name, facts in manifest.files.items():
        content = (tmp_path / "bundle" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (facts.bytes, facts.sha256)
    assert manifest.source["dtype"] == "bfloat16" and manifest.source["name"] == "checkpoint"
    config = (checkpoint / "config.json").read_bytes()
    assert manifest.source["config_sha256"] == hashlib.sha256(config).hexdigest()
    assert [stage for stage, done, total in stages if done == total] == ["embeddings", "vision", "decoder", "parity"]
    report = manifest.parity
    assert report["passed"] and report["vision_relative_error"] <= 1e-4 and report["logits_relative_error"] <= 1e-4
    assert report["top1_agreement"] == 1.0 and "transformers" in report["reference"]


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first = export_checkpoint(checkpoint, tmp_path / "one", weights="int4")
    second = export_checkpoint(checkpoint, tmp_path / "two", weights="int4")
    assert first.files == second.files


def test_an_export_interrupted_before_anything_is_finished_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, tmp_path / "bundle", progress=interrupt)
    assert leftovers(tmp_path) == []


def test_a_killed_export_leaves_no_bundle_and_the_next_one_tidies_up(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from export.api import export_checkpoint\n"
        "def kill(stage, done, total):\n"
        "    if (stage, done) == ('decoder', 1): os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_checkpoint(sys.argv[1], sys.argv[2], progress=kill)\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint), str(tmp_path / "bundle")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    (partial,) = leftovers(tmp_path)
    assert partial.startswith(".bundle.partial-") and contract.MANIFEST_FILE not in leftovers(tmp_path / partial)
    export_checkpoint(checkpoint, tmp_path / "bundle")
    assert leftovers(tmp_path) == ["bundle"]


def test_an_existing_bundle_is_replaced_only_on_request_and_other_folders_never(
    checkpoint: Path, tmp_path: Path
) -> None:
    export_checkpoint(checkpoint, tmp_path / "bundle")
    with pytest.raises(OutputError, match="exists"):
        export_checkpoint(checkpoint, tmp_path / "bundle", weights="int8")
    assert export_checkpoint(checkpoint, tmp_path / "bundle", weights="int8", overwrite=True).decoder.weights == "int8"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not a bundle"):
        export_checkpoint(checkpoint, tmp_path / "home", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        export_checkpoint(checkpoint, tmp_path / "home" / "letter.txt", overwrite=True)
    assert leftovers(tmp_path / "home") == ["letter.txt"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    """A web application has a `manifest.json` too."""
    app = tmp_path / "app"
    (app / "src").mkdir(parents=True)
    (app / "src" / "thesis.txt").write_text("three years")
    for content in ('{"name": "app"}', "[]", "no json", "[" * 10**5, '{"schema": "streamo.bundle/1"}', '{"schema": 3}'):
        (app / contract.MANIFEST_FILE).write_text(content)
        with pytest.raises(OutputError, match="exists and is not a bundle"):
            BundleWriter(app, 0, overwrite=True)
    assert (app / "src" / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("kind", ["file", "folder", "link", "folder of a file's name"])
def test_a_bundle_that_holds_a_foreign_entry_is_not_replaced(tmp_path: Path, kind: str) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = {"schema": "streamo.bundle/0", "files": {"decoder.onnx": {}}}
    (bundle / contract.MANIFEST_FILE).write_text(json.dumps(manifest))
    BundleWriter(bundle, 0, overwrite=True)  # a file that is missing does not matter
    name = "decoder.onnx" if kind == "folder of a file's name" else "mine"
    if kind == "file":
        (bundle / name).write_text("keep")
    elif kind == "link":
        (bundle / name).symlink_to(tmp_path)
    else:
        (bundle / name).mkdir()
    with pytest.raises(OutputError, match=f"also holds `{name}`, which is not one of its 2 files"):
        BundleWriter(bundle, 0, overwrite=True)
    assert (bundle / name).exists()


def test_what_is_put_there_during_an_export_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    def write(stage: str, done: int, total: int) -> None:
        (tmp_path / "bundle").mkdir(exist_ok=True)
        (tmp_path / "bundle" / "letter.txt").write_text("dear")

    with pytest.raises(OutputError, match="is not a bundle"):
        export_checkpoint(checkpoint, tmp_path / "bundle", progress=write, overwrite=True)
    assert leftovers(tmp_path) == ["bundle"] and leftovers(tmp_path / "bundle") == ["letter.txt"]


def test_a_link_to_a_bundle_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "bundle")
    (tmp_path / "latest").symlink_to("bundle")
    export_checkpoint(checkpoint, tmp_path / "latest", weights="int8", overwrite=True)
    assert leftovers(tmp_path) == ["bundle", "latest"] and (tmp_path / "latest").is_symlink()
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["decoder"]["weights"] == "int8"


def test_the_root_folder_cannot_become_a_bundle() -> None:
    with pytest.raises(OutputError, match="`/` cannot become a bundle"):
        BundleWriter(Path("/"), 0, overwrite=True)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte", "x" * 300 + "/bundle"])
def test_a_name_that_the_system_does_not_take_is_one_clear_error(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"cannot be written: .*(too long|null)"):
        export_checkpoint(checkpoint, tmp_path / name)
    assert leftovers(tmp_path) == []


def test_a_folder_that_may_not_be_read_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / contract.MANIFEST_FILE).write_text('{"schema": "streamo.bundle/1", "files": {}}')
    for method in ("exists", "iterdir", "open"):
        with monkeypatch.context() as patch, pytest.raises(OutputError, match="cannot be written: Permission denied"):
            patch.setattr(Path, method, refuse)  # tests may run as root, who may read everything
            BundleWriter(tmp_path / "bundle", 0, overwrite=True)


def test_a_full_disk_is_seen_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(bundle_writer.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(OutputError, match="has 1 MB free"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_a_write_that_fails_midway_is_one_clear_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_created_is_one_clear_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        export_checkpoint(checkpoint, tmp_path / "file" / "bundle")


def test_a_graph_that_computes_something_else_is_not_written_unless_allowed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = components.write_vision

    def damaged(writer: components.WeightWriter, precision: str, step: object) -> None:
        original(writer, precision, step)  # type: ignore[arg-type]
        one, two = "blocks.0.norm1", "blocks.0.norm2"
        writer.stored[one], writer.stored[two] = writer.stored[two], writer.stored[one]

    monkeypatch.setattr(components, "write_vision", damaged)
    monkeypatch.setattr(proof, "_problems", lambda written: [])  # which would name the weights first
    with pytest.raises(ParityError, match=r"vision_relative_error [\d.]+, at most 0.0001 expected") as caught:
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert caught.value.exit_code == 3 and "--allow-mismatch" in str(caught.value.hint)
    assert leftovers(tmp_path) == []
    manifest = export_checkpoint(checkpoint, tmp_path / "bundle", allow_mismatch=True)
    assert not manifest.parity["passed"]
    assert contract.manifest_from_json(json.loads((tmp_path / "bundle" / "manifest.json").read_text())) == manifest


def test_a_graph_whose_logits_are_no_numbers_does_not_pass() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 20))
    verdict = parity.verdict(1e-7, np.full_like(logits, np.nan), logits, parity.THRESHOLDS["int4"])
    assert not verdict["passed"] and verdict["logit_cosine_min"] is None
    json.dumps(verdict, allow_nan=False)
    with pytest.raises(ParityError, match="logit_cosine_min None"):
        parity.require_parity({**verdict, "reference": "x"})


@pytest.mark.parametrize("budget_bytes", [1, 400_000])
def test_parity_by_slices_of_layers_gives_the_figures_of_the_whole_graph(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_bytes: int
) -> None:
    for weights in ("fp32", "int8"):
        whole = export_checkpoint(checkpoint, tmp_path / f"{weights}-whole", weights=weights)
        monkeypatch.setattr(proof, "_weights_budget_bytes", lambda checkpoint: budget_bytes)
        monkeypatch.setattr(graph_check, "HEAD_PIECE_BYTES", 20_000)
        sliced = export_checkpoint(checkpoint, tmp_path / f"{weights}-sliced", weights=weights)
        monkeypatch.undo()
        assert sliced.files == whole.files
        for figure in ("vision_relative_error", "logits_relative_error"):
            assert sliced.parity[figure] == pytest.approx(whole.parity[figure], rel=0.5, abs=1e-6)


def test_arguments_that_are_not_known_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int3'"):
        export_checkpoint(checkpoint, tmp_path / "bundle", weights="int3")
    with pytest.raises(UsageError, match="Block size 7"):
        export_checkpoint(checkpoint, tmp_path / "bundle", block_size=7)
    with pytest.raises(CheckpointError):
        export_checkpoint(tmp_path, tmp_path / "bundle")


def test_a_recorded_reference_takes_the_place_of_pytorch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_reference(checkpoint, tmp_path / "reference.npz")
    asked = export_checkpoint(checkpoint, tmp_path / "asked")
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    recorded = export_checkpoint(checkpoint, tmp_path / "recorded", reference=tmp_path / "reference.npz")
    assert recorded.parity == {**asked.parity, "reference": f"{asked.parity['reference']} (recorded)"}
    with pytest.raises(UsageError, match="needs `torch`, which is not installed"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    write_checkpoint_without_torch(checkpoint, tmp_path / "other")
    with pytest.raises(CheckpointError, match="made from another checkpoint"):
        export_checkpoint(tmp_path / "other", tmp_path / "bundle", reference=tmp_path / "reference.npz")
    (tmp_path / "reference.npz").write_bytes((tmp_path / "reference.npz").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_checkpoint(checkpoint, tmp_path / "bundle", reference=tmp_path / "reference.npz")


def write_checkpoint_without_torch(checkpoint: Path, other: Path) -> None:
    """A copy with one weight changed."""
    shutil.copytree(checkpoint, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (other / "model.safetensors").write_bytes(content)

"""The gate catches weights that are wrong on purpose: damage is done to a written bundle before it is proved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_checkpoint import write_checkpoint

from edge.errors import ParityError
from export import api, proof
from export.api import export_checkpoint
from export.checkpoint import open_checkpoint
from export.expected import Expected, compute_expected
from export.parity import require_parity
from export.probe import Probe
from export.proof import Written
from export.source import open_source

Damage = Callable[[Written], None]


@dataclass
class Sound:
    """A checkpoint, and its bundles as they were before they were proved, by precision."""

    checkpoint: Path
    bundles: dict[str, Written]
    probe: Probe
    expected: Expected

    def copy(self, weights: str, folder: Path) -> Written:
        """A bundle to be damaged."""
        written = self.bundles[weights]
        shutil.copytree(written.folder, folder)
        return replace(written, folder=folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("gate")
    write_checkpoint(folder / "checkpoint", layers=3)
    source = open_source(folder / "checkpoint")
    bundles = {}
    for weights in ("fp32", "int8", "int4"):
        kept = folder / weights

        def keep(written: Written, *_: Any, kept: Path = kept) -> dict[str, Any]:
            shutil.copytree(written.folder, kept)
            bundles[kept.name] = replace(written, folder=kept)
            return {"passed": True}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api, "prove", keep)
            export_checkpoint(folder / "checkpoint", folder / "bundle", weights=weights, overwrite=True)
    return Sound(folder / "checkpoint", bundles, source.probe, compute_expected(source.checkpoint, source.probe))


def stored_bytes(written: Written, name: str) -> np.ndarray:
    """A stored decoder weight's bytes, writable in place."""
    place = written.decoder.stored[name]
    return np.memmap(written.folder / place.file, np.uint8, "r+", place.offset, (place.length,))


def transposed(written: Written) -> None:
    """The output projection of one layer: square, so that every shape still fits."""
    place = written.decoder.stored["layers.1.attention_output.weight"]
    raw = stored_bytes(written, "layers.1.attention_output.weight")
    if place.dtype == "int4":
        nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(place.shape).T.reshape(-1, 2)
        raw[:] = nibbles[:, 0] | nibbles[:, 1] << 4
    else:
        values = np.frombuffer(bytes(raw), place.dtype).reshape(place.shape)
        raw[:] = np.frombuffer(np.ascontiguousarray(values.T).tobytes(), np.uint8)


def without_a_bias(written: Written) -> None:
    """The queries', keys' and values' of one layer."""
    stored_bytes(written, "layers.2.qkv.bias")[:] = 0


def with_layers_exchanged(written: Written) -> None:
    """Every weight of the first layer with the second one's."""
    for name in [name for name in written.decoder.stored if name.startswith("layers.0.")]:
        one, other = stored_bytes(written, name), stored_bytes(written, name.replace("layers.0.", "layers.1."))
        one[:], other[:] = bytes_of(other), bytes_of(one)


def bytes_of(array: np.ndarray) -> np.ndarray:
    return np.array(array)


DAMAGES = [
    (transposed, "layers.1.self_attn.o_proj.weight"),
    (without_a_bias, "layers.2.self_attn.q_proj.bias"),
    (with_layers_exchanged, "layers.0."),
]


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_sound_bundle_has_no_problems(sound: Sound, weights: str) -> None:
    assert proof._problems(sound.bundles[weights]) == []


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_wrong_weight_is_named_in_every_precision(
    sound: Sound, tmp_path: Path, damage: Damage, named: str, weights: str
) -> None:
    written = sound.copy(weights, tmp_path / "bundle")
    damage(written)
    parity = {"problems": proof._problems(written), "passed": True}
    with pytest.raises(ParityError) as caught:
        require_parity(parity)
    assert named in caught.value.message and "of its norm" in caught.value.message


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES])
def test_a_wrong_weight_also_shows_in_what_the_graphs_compute(
    sound: Sound, tmp_path: Path, damage: Damage, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = sound.copy(weights, tmp_path / "bundle")
    damage(written)
    monkeypatch.setattr(proof, "_problems", lambda written: [])
    with pytest.raises(ParityError, match="graphs differ from transformers"):
        require_parity(proof.prove(written, sound.probe, sound.expected))


def test_a_damaged_bundle_is_not_published(sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = proof.prove

    def prove(written: Written, *arguments: Any) -> dict[str, Any]:
        transposed(written)
        return original(written, *arguments)

    monkeypatch.setattr(api, "prove", prove)
    with pytest.raises(ParityError):
        export_checkpoint(sound.checkpoint, tmp_path / "bundle", weights="int4")
    assert not list(tmp_path.iterdir())


def misread(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> None:
    """Let our reading of the config be wrong, while transformers reads the same file."""

    def opened(folder: Path) -> Any:
        found = open_checkpoint(folder)
        return replace(found, facts=replace(found.facts, decoder=replace(found.facts.decoder, **wrong)))

    monkeypatch.setattr("export.source.open_checkpoint", opened)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mrope_section": (4, 2, 2)}, "mrope_section"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is read as 1e-05, transformers reads 1e-06"),
        ({"rope_theta": 1e5}, "rotary frequencies"),
    ],
)
def test_a_config_that_is_misread_is_named(
    sound: Sound, tmp_path: Path, wrong: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    misread(monkeypatch, **wrong)
    with pytest.raises(ParityError) as caught:
        export_checkpoint(sound.checkpoint, tmp_path / "bundle", weights="int4")
    assert named in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_wrong_positions_also_show_in_what_the_graphs_compute(
    sound: Sound, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    misread(monkeypatch, mrope_section=(4, 2, 2))
    monkeypatch.setattr("export.reference.Reference.config_problems", lambda self: [])
    with pytest.raises(ParityError, match="graphs differ from transformers"):
        export_checkpoint(sound.checkpoint, tmp_path / "bundle", weights=weights)


def edited(file: str, edit: Callable[[onnx.GraphProto], None]) -> Damage:
    """Damage of one written graph."""

    def damage(written: Written) -> None:
        path = written.folder / file
        model = onnx.load(path, load_external_data=False)
        edit(model.graph)
        path.write_bytes(model.SerializeToString())

    return damage


def one_epsilon(graph: onnx.GraphProto) -> None:
    """Of one norm in a native graph."""
    norm = [node for node in graph.node if node.op_type == "SimplifiedLayerNormalization"][3]
    next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 1e-5


def the_epsilon(graph: onnx.GraphProto) -> None:
    """Of all norms in a stock graph, which share one constant."""
    root = next(node for node in graph.node if node.op_type == "Sqrt")
    names = next(node for node in graph.node if root.input[0] in node.output).input
    tensor = next(tensor for tensor in graph.initializer if tensor.name in names)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(1e-5, np.float32), tensor.name))


def two_weights_exchanged(graph: onnx.GraphProto) -> None:
    """Where two layers' weights are read from."""
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    one, other = by_name["layers.0.down.weight"], by_name["layers.1.down.weight"]
    kept = [entry.value for entry in one.external_data]
    for entry, value in zip(one.external_data, [entry.value for entry in other.external_data], strict=True):
        entry.value = value
    for entry, value in zip(other.external_data, kept, strict=True):
        entry.value = value


def another_layers_weight(graph: onnx.GraphProto) -> None:
    """A node that is given the weight of the layer behind it."""
    for node in graph.node:
        if node.name.startswith("layers.0/"):
            for i, name in enumerate(node.input):
                if name == "layers.0.post_norm":
                    node.input[i] = "layers.1.post_norm"


def a_scale(graph: onnx.GraphProto) -> None:
    """Of one attention."""
    node = [node for node in graph.node if "Attention" in node.op_type][1]
    next(attribute for attribute in node.attribute if attribute.name == "scale").f = 0.3


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        ("decoder.native.onnx", one_epsilon, "has epsilon 1e-05, the config says 1e-06"),
        ("vision.native.onnx", one_epsilon, "`vision.native.onnx` norm"),
        ("decoder.onnx", the_epsilon, "has epsilon 1e-05, the config says 1e-06"),
        ("decoder.onnx", two_weights_exchanged, "it was written to"),
        ("decoder.native.onnx", two_weights_exchanged, "it was written to"),
        ("decoder.native.onnx", another_layers_weight, "a weight of another layer"),
        ("decoder.native.onnx", a_scale, "has scale 0.3"),
    ],
)
def test_a_damaged_graph_is_named(
    sound: Sound, tmp_path: Path, file: str, edit: Callable[..., None], named: str
) -> None:
    written = sound.copy("int4", tmp_path / "bundle")
    edited(file, edit)(written)
    with pytest.raises(ParityError) as caught:
        require_parity({"problems": proof._problems(written), "passed": True})
    assert named in caught.value.message and "please report it" in str(caught.value.hint)

"""The exported graphs compute what transformers computes, on random weights of several shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from kernel_cases import relative_error
from tiny_checkpoint import VOCABULARY, token_id, write_checkpoint

from edge import contract
from edge.rope import decoder_rope, frame_tables
from export.api import export_checkpoint
from export.checkpoint import open_checkpoint

RELATIVE_ERROR = 1e-4
IMAGE_PAD = token_id("<|image_pad|>")
SHAPES: dict[str, dict[str, Any]] = {
    "16/2 heads, tied, float32": {"heads": 16, "kv_heads": 2, "head_dim": 16, "tied": True},
    "28/4 heads, untied, bfloat16, shards": {
        "heads": 28, "kv_heads": 4, "head_dim": 8, "tied": False, "dtype": "bfloat16", "max_shard_size": "200KB",
    },
    "4/4 heads, untied, float16": {
        "heads": 4, "kv_heads": 4, "head_dim": 32, "tied": False, "dtype": "float16", "layers": 3,
    },
}  # fmt: skip


def with_time_axis(patches: np.ndarray) -> np.ndarray:
    """Patches (P, 3 * 14 * 14) of one frame as transformers takes them: the frame twice, (P, 3 * 2 * 14 * 14)."""
    return np.repeat(patches.reshape(-1, 3, 1, 196), 2, axis=2).reshape(len(patches), -1)


class Exported:
    """A bundle's sessions and the transformers model it was made from."""

    def __init__(self, folder: Path, **shape: Any) -> None:
        self.model = write_checkpoint(folder / "checkpoint", **shape)
        self.facts = open_checkpoint(folder / "checkpoint").facts
        self.manifest = export_checkpoint(folder / "checkpoint", folder / "bundle")
        self.vision = onnxruntime.InferenceSession(str(folder / "bundle" / contract.VISION_FILE))
        self.decoder = onnxruntime.InferenceSession(str(folder / "bundle" / contract.DECODER_FILE))

    def embed_frame(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        tables = frame_tables(
            rows, columns, self.facts.vision, merge=self.facts.merge_size, patch_size=self.facts.patch_size
        )
        return self.vision.run([contract.IMAGE_EMBEDS], {contract.PATCHES: patches, **tables.feeds})[0]


class Cache:
    """A KV cache of one capacity, bound to the decoder's inputs and outputs at once, so that it is updated in place."""

    def __init__(self, exported: Exported, capacity: int) -> None:
        self.exported = exported
        facts = exported.facts.decoder
        shape = (1, facts.num_kv_heads, capacity, facts.head_dim)
        names = [f(i) for i in range(facts.layers) for f in (contract.key_cache_name, contract.value_cache_name)]
        self.buffers = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for n in names}
        self.length = 0

    def append(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits (V,) after new tokens: embeddings (T, W), positions (3, T)."""
        cos, sin = decoder_rope(self.exported.facts.decoder).tables(positions)
        binding = self.exported.decoder.io_binding()
        binding.bind_cpu_input(contract.INPUTS_EMBEDS, embeds)
        binding.bind_cpu_input(contract.ROPE_COS, cos)
        binding.bind_cpu_input(contract.ROPE_SIN, sin)
        binding.bind_cpu_input(contract.CACHE_LENGTH, np.array([self.length], np.int32))
        binding.bind_output(contract.LOGITS)
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(contract.updated(name), buffer)
        self.exported.decoder.run_with_iobinding(binding)
        self.length += len(embeds)
        return binding.get_outputs()[0].numpy()[0]


@pytest.fixture(scope="module", params=list(SHAPES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("export"), **SHAPES[request.param])


# Whole windows, windows cut at the edges, one row of windows, a single block, and the longest frame allowed.
@pytest.mark.parametrize("grid", [(16, 16), (16, 30), (6, 10), (2, 2), (2, 40), (34, 14)])
def test_vision_graph_equals_transformers_at_any_frame_size(exported: Exported, grid: tuple[int, int]) -> None:
    patches = np.random.default_rng(0).standard_normal((grid[0] * grid[1], 588)).astype(np.float32)
    with torch.inference_mode():
        pixels = torch.from_numpy(with_time_axis(patches))
        expected = exported.model.model.visual(pixels, grid_thw=torch.tensor([[1, *grid]]))
    found = exported.embed_frame(patches, *grid)
    assert found.shape == (grid[0] * grid[1] // 4, exported.facts.vision.out_hidden_size)
    assert relative_error(found, expected.numpy()) <= RELATIVE_ERROR


def conversation(exported: Exported, turns: int) -> tuple[list[np.ndarray], list[tuple[int, int]], np.ndarray]:
    """Turns of text, a frame and text, as token ids; the frames' grids; all frames' patches."""
    rng = np.random.default_rng(1)
    grids = [[(4, 6), (6, 4), (2, 2)][turn % 3] for turn in range(turns)]
    parts = []
    for rows, columns in grids:
        text = rng.integers(0, 256, int(rng.integers(3, 9)))
        image = [token_id("<|vision_start|>"), *[IMAGE_PAD] * (rows * columns // 4), token_id("<|vision_end|>")]
        parts.append(np.concatenate([text, image, rng.integers(0, 256, 4)]))
    patches = rng.standard_normal((sum(rows * columns for rows, columns in grids), 588)).astype(np.float32)
    return parts, grids, patches


def test_appending_turn_by_turn_gives_the_logits_of_one_full_prefill_in_transformers(exported: Exported) -> None:
    turns, grids, patches = conversation(exported, 12)
    replies = np.random.default_rng(2).integers(0, 256, 5)  # then single tokens, as in decoding
    ids = torch.from_numpy(np.concatenate([*turns, replies]))[None]
    grid_thw = torch.tensor([[1, *grid] for grid in grids])
    with torch.inference_mode():
        pixels = torch.from_numpy(with_time_axis(patches))
        expected = exported.model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid_thw).logits
    positions = exported.model.model.get_rope_index(ids, grid_thw)[0][:, 0].numpy()

    embeds = exported.model.get_input_embeddings().weight.detach().numpy()[ids[0].numpy()]
    starts = np.cumsum([0, *(rows * columns for rows, columns in grids)])
    frames = [exported.embed_frame(patches[a:b], *grid) for a, b, grid in zip(starts, starts[1:], grids, strict=False)]
    embeds[ids[0].numpy() == IMAGE_PAD] = np.concatenate(frames)
    cache = Cache(exported, capacity=512)
    end = 0
    for part in [*turns, *np.split(replies, len(replies))]:
        start, end = end, end + len(part)
        found = cache.append(embeds[start:end], positions[:, start:end])
        assert relative_error(found, expected[0, end - 1].numpy()) <= RELATIVE_ERROR
    assert found.shape == (VOCABULARY,)
    for buffer in cache.buffers.values():
        assert np.abs(buffer.numpy()[0, :, :end]).min(axis=-1).all()  # written in place, one row a token
        assert not buffer.numpy()[0, :, end:].any()  # and nothing behind them


def test_inputs_and_outputs_are_those_of_the_manifest_and_the_contract(exported: Exported) -> None:
    types = {"float32": "tensor(float)", "int32": "tensor(int32)"}
    manifest = exported.manifest
    for session, component in ((exported.vision, manifest.vision), (exported.decoder, manifest.decoder)):
        for found, expected in ((session.get_inputs(), component.inputs), (session.get_outputs(), component.outputs)):
            assert [v.name for v in found] == [v.name for v in expected]
            assert [v.type for v in found] == [types[v.dtype] for v in expected]
            assert [tuple(v.shape) for v in found] == [v.shape for v in expected]
    names = [v.name for v in exported.manifest.decoder.inputs]
    assert names[:4] == [contract.INPUTS_EMBEDS, contract.ROPE_COS, contract.ROPE_SIN, contract.CACHE_LENGTH]
    assert names[4:6] == ["key_cache.0", "value_cache.0"]


def test_embedding_file_holds_the_rows_of_the_checkpoint(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", tied=False)
    table = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle").embedding
    found = np.fromfile(tmp_path / "bundle" / table.file, table.dtype).reshape(table.rows, table.columns)
    np.testing.assert_array_equal(found, model.get_input_embeddings().weight.detach().numpy())


def test_untied_head_with_a_tied_flag_only_at_the_top_level_of_the_config_is_read(tmp_path: Path) -> None:
    """Older configs are flat, newer ones nest the text part; both spell the same model."""
    write_checkpoint(tmp_path / "checkpoint", tied=False)
    nested = open_checkpoint(tmp_path / "checkpoint").facts
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    config.update({key: value for key, value in text.items() if key not in ("model_type", "architectures")})
    path.write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "checkpoint").facts == nested

"""Positions and rotary tables equal those that transformers computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.rope import MultimodalRope, image_positions, text_positions, vision_tables, window_mask

IMAGE_PAD, VISION_START = 151655, 151652


def positions_of(parts: list[int | tuple[int, int]]) -> np.ndarray:
    """Our positions of a prompt: an integer is that many text tokens, a pair is a frame's rows and columns."""
    position, found = 0, []
    for part in parts:
        if isinstance(part, tuple):
            found.append(image_positions(position, *part))
            position += max(part)
        else:
            found.append(text_positions(position, part))
            position += part
    return np.concatenate(found, axis=1)


@given(st.lists(st.tuples(st.integers(1, 20), st.tuples(st.integers(1, 9), st.integers(1, 9))), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_positions_equal_get_rope_index_on_the_whole_prompt(turns: list[tuple[int, tuple[int, int]]]) -> None:
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    configuration = pytest.importorskip("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl")
    parts: list[int | tuple[int, int]] = []
    ids, grids = [], []
    for text_tokens, (rows, columns) in turns:
        parts += [text_tokens + 1, (rows, columns)]
        ids += [7] * text_tokens + [VISION_START] + [IMAGE_PAD] * (rows * columns)
        grids.append((1, 2 * rows, 2 * columns))
    parts.append(4)
    ids += [7] * 4
    config = configuration.Qwen2_5_VLConfig(image_token_id=IMAGE_PAD, vision_start_token_id=VISION_START)

    class Bare:
        pass

    model = Bare()
    model.config = config  # type: ignore[attr-defined]
    expected, _ = modeling.Qwen2_5_VLModel.get_rope_index(model, torch.tensor([ids]), torch.tensor(grids))
    np.testing.assert_array_equal(positions_of(parts), expected[:, 0].numpy())


def test_rotary_rows_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    positions = positions_of([191, (8, 15), 24, (8, 15), 20])
    sections = (16, 24, 24)
    cos, sin = MultimodalRope(128, 1e6, sections).tables(positions)
    query = torch.randn(1, 2, positions.shape[1], 128, dtype=torch.float64)
    half = torch.arange(64, dtype=torch.float64) / 64
    angles = torch.tensor(positions).double()[:, None, :, None] * (1e6**-half)
    full = torch.cat([angles, angles], dim=-1)
    expected, _ = modeling.apply_multimodal_rotary_pos_emb(query, query, full.cos(), full.sin(), list(sections))
    first, second = query[..., :64], query[..., 64:]
    cos_, sin_ = torch.tensor(cos).double(), torch.tensor(sin).double()
    ours = torch.cat([first * cos_ - second * sin_, second * cos_ + first * sin_], dim=-1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (16, 30), (2, 2), (8, 8), (18, 26)])
def test_vision_tables_and_windows_equal_those_of_transformers(rows: int, columns: int) -> None:
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    configuration = pytest.importorskip("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl")
    config = configuration.Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=64, num_heads=2, intermediate_size=32, out_hidden_size=32, fullatt_block_indexes=[0]
    )
    tower = modeling.Qwen2_5_VisionTransformerPretrainedModel(config)
    grid = torch.tensor([[1, rows, columns]])
    angles = tower.rot_pos_emb(grid).double()
    cos, sin = vision_tables(rows, columns, 2, 32)
    np.testing.assert_allclose(cos, angles.cos().numpy(), atol=2e-6)
    np.testing.assert_allclose(sin, angles.sin().numpy(), atol=2e-6)

    window_index, boundaries = tower.get_window_index(grid)
    boundaries = sorted(set(int(boundary) for boundary in boundaries))
    window_of_unit = np.empty(rows * columns // 4, np.int64)
    for window, (start, end) in enumerate(itertools.pairwise(boundaries)):
        window_of_unit[window_index[start // 4 : end // 4].numpy()] = window
    window_of_patch = np.repeat(window_of_unit, 4)
    same_window = window_of_patch[:, None] == window_of_patch[None, :]
    np.testing.assert_array_equal(window_mask(rows, columns, 2, 8) == 0, same_window)

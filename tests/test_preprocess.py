"""Frames become patches exactly as transformers' image processor makes them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.preprocess import PreprocessConfig, patchify, resize_frame, smart_resize

SIZES = [(1080, 1920), (480, 640), (1280, 720), (28, 28), (9, 13), (2160, 3840), (337, 561), (101, 199), (56, 1000)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("max_pixels", [100352, 11760])
def test_patches_equal_those_of_transformers(height: int, width: int, max_pixels: int) -> None:
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    config = PreprocessConfig(max_pixels=max_pixels)
    frame = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    processor = processing.Qwen2VLImageProcessor(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    expected = processor(images=[frame], return_tensors="np")

    resized = resize_frame(frame, config)
    patches = patchify(resized, config)

    assert tuple(expected["image_grid_thw"][0]) == (1, resized.shape[0] // 14, resized.shape[1] // 14)
    assert patches.dtype == np.float32
    pixels = expected["pixel_values"].reshape(len(patches), 3, 2, 14 * 14)  # with a time axis, of one frame twice
    for step in range(2):
        np.testing.assert_allclose(patches.reshape(len(patches), 3, -1), pixels[:, :, step], atol=2e-6)


@pytest.mark.parametrize(
    ("height", "width", "digest"), [(240, 426, "78a294"), (120, 160, "894c0c"), (96, 128, "767210")]
)
def test_every_version_of_pillow_gives_the_pixels_of_version_12(height: int, width: int, digest: str) -> None:
    """Digests of what Pillow 12.0.0 made in one call; version 13 differs by 21 to 23 levels there."""
    frame = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    assert hashlib.md5(resize_frame(frame, PreprocessConfig()).tobytes()).hexdigest()[:6] == digest


def test_a_16_by_9_frame_becomes_120_visual_tokens() -> None:
    height, width = smart_resize(1080, 1920, PreprocessConfig())
    assert (height, width) == (224, 420)
    assert height * width // 28**2 == 120


def test_a_frame_of_the_right_size_is_not_copied() -> None:
    frame = np.zeros((224, 420, 3), np.uint8)
    assert resize_frame(frame, PreprocessConfig()) is frame


def test_an_extremely_long_frame_is_refused_with_both_sides() -> None:
    with pytest.raises(ValueError, match="2x1000"):
        smart_resize(1000, 2, PreprocessConfig())


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000))
@example(18, 3599)
def test_the_resized_frame_is_whole_tokens_within_the_limits(height: int, width: int) -> None:
    config = PreprocessConfig()
    if max(height, width) / min(height, width) > 200:
        return
    new_height, new_width = smart_resize(height, width, config)
    assert new_height % config.factor == new_width % config.factor == 0
    ratio = max(height, width) / min(height, width)  # a strip becomes one token high, and as long as its area allowed
    longest_strip = config.factor * max(height, width, (config.max_pixels * ratio) ** 0.5)
    assert new_height * new_width <= max(config.max_pixels, longest_strip)
    assert new_height * new_width >= config.min_pixels // 4

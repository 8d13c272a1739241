"""Frames to patches on a GPU, through the launcher, in Triton's interpreter: against Pillow and OpenCV."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_kernels

from edge import gpu_operations as operations
from edge.errors import KernelError
from edge.gpu import DeviceArray, Gpu
from edge.preprocess import CLIP_MEAN, CLIP_STD, PreprocessConfig, patchify, resize_to

pytestmark = [needs_kernels, needs_triton, needs_compiler]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpu]:
    with FakeCuda(tmp_path_factory.mktemp("cuda")).open() as opened:
        yield opened


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise over slow waves: what rounds badly, and what overshoots."""
    random = np.random.default_rng(seed)
    waves = 127 * (1 + np.sin(np.arange(height)[:, None] / 9 + np.arange(width) / 5))
    noise = random.integers(-90, 90, (height, width, 3))
    return np.clip(waves[..., None] + noise, 0, 255).astype(np.uint8)


def on_cpu(frame: np.ndarray, size: tuple[int, int], config: PreprocessConfig) -> np.ndarray:
    return patchify(resize_to(frame, *size), config)


def on_gpu(gpu: Gpu, size: tuple[int, int], config: PreprocessConfig, *planes: np.ndarray, **colours: bool):
    found = operations.patches_of_frame(
        gpu, *[gpu.array(np.ascontiguousarray(plane)) for plane in planes], new_size=size, patch=config.patch_size,
        merge=config.merge_size, mean=config.image_mean, deviation=config.image_std, **colours,
    )  # fmt: skip
    return gpu.numpy(found)


@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        ((67, 91), (28, 56)),
        ((40, 50), (56, 84)),
        ((28, 56), (28, 56)),
        ((5, 120), (28, 28)),
        ((1, 1), (28, 28)),
    ],
    ids=str,
)
def test_an_rgb_frame_gives_the_cpus_patches_to_the_bit(gpu: Gpu, size: tuple[int, int], new_size: tuple[int, int]):
    config = PreprocessConfig()
    frame = picture(*size)
    np.testing.assert_array_equal(on_gpu(gpu, new_size, config, frame), on_cpu(frame, new_size, config))


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 2), st.integers(1, 3), st.sampled_from([(6, 2), (9, 1)]))
def test_any_size_gives_pillows_pixels(gpu: Gpu, height: int, width: int, down: int, across: int, cut: tuple[int, int]):
    patch, merge = cut
    config = PreprocessConfig(patch_size=patch, merge_size=merge)
    new_size = (down * patch * merge, across * patch * merge)
    frame = picture(height, width, seed=height)
    np.testing.assert_array_equal(on_gpu(gpu, new_size, config, frame), on_cpu(frame, new_size, config))


def test_hard_edges_overshoot_and_are_clipped_as_pillow_does(gpu: Gpu):
    frame = np.where(np.random.default_rng(0).random((50, 41, 1)) < 0.5, 0, 255).astype(np.uint8).repeat(3, 2)
    config = PreprocessConfig()
    np.testing.assert_array_equal(on_gpu(gpu, (28, 56), config, frame), on_cpu(frame, (28, 56), config))


PLAIN = PreprocessConfig(patch_size=8, image_mean=(0.0,) * 3, image_std=(1 / 255,) * 3)
"""Patches are the pixels, 0 to 255."""


def nv12(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    luma = random.integers(0, 256, (height, width), np.uint8)
    return luma, random.integers(0, 256, (height // 2, width // 2, 2), np.uint8)


def test_nv12_is_opencvs_rgb_within_one_level_by_default(gpu: Gpu):
    """OpenCV rounds the factors of BT.601 to three decimals."""
    cv2 = pytest.importorskip("cv2")
    luma, chroma = nv12(64, 48)
    stacked = np.concatenate([luma, chroma.reshape(32, 48)])
    expected = patchify(cv2.cvtColor(stacked, cv2.COLOR_YUV2RGB_NV12), PLAIN)
    assert np.abs(on_gpu(gpu, (64, 48), PLAIN, luma, chroma) - expected).max() <= 1.01


@pytest.mark.parametrize("bt709", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
def test_nv12_follows_the_standards(gpu: Gpu, bt709: bool, full_range: bool):
    luma, chroma = nv12(48, 32, seed=1)
    red, blue = (0.2126, 0.0722) if bt709 else (0.299, 0.114)
    y = luma.astype(np.float64) if full_range else np.maximum(luma.astype(np.float64) - 16, 0) * 255 / 219
    differences = (chroma.astype(np.float64) - 128) * (1 if full_range else 255 / 224)
    u, v = differences.repeat(2, 0).repeat(2, 1).transpose(2, 0, 1)
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    expected = patchify(np.rint(np.clip(np.stack([r, g, b], -1), 0, 255)).astype(np.uint8), PLAIN)
    found = on_gpu(gpu, (48, 32), PLAIN, luma, chroma, bt709=bt709, full_range=full_range)
    assert np.abs(found - expected).max() <= 1.01
    assert np.mean(np.abs(found - expected) > 0.5) < 0.001


def test_nv12_is_resized_as_its_rgb_is(gpu: Gpu):
    luma, chroma = nv12(54, 72, seed=2)
    own = on_gpu(gpu, (54, 72), PreprocessConfig(patch_size=18, merge_size=1, image_mean=(0.0,) * 3,
                                                 image_std=(1 / 255,) * 3), luma, chroma)  # fmt: skip
    tiles = np.rint(own).astype(np.uint8).reshape(3, 4, 3, 18, 18)
    rgb = tiles.transpose(0, 3, 1, 4, 2).reshape(54, 72, 3)
    config = PreprocessConfig()
    np.testing.assert_array_equal(on_gpu(gpu, (28, 56), config, luma, chroma), on_cpu(rgb, (28, 56), config))


def test_repeated_runs_are_identical_and_sizes_may_alternate(gpu: Gpu):
    config = PreprocessConfig()
    small, large = picture(30, 40), picture(40, 30)
    first = [on_gpu(gpu, (28, 28), config, frame).tobytes() for frame in (small, large)]
    again = [on_gpu(gpu, (28, 28), config, frame).tobytes() for frame in (small, large)]
    assert first == again


@pytest.mark.parametrize(
    ("frame", "new_size", "said"),
    [
        ((30, 30), (30, 28), "multiples of 28 pixels up to 16384, found 28x30"),
        ((30, 30), (0, 28), "multiples of 28 pixels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(gpu: Gpu, frame: tuple[int, int], new_size: tuple[int, int], said: str):
    with pytest.raises(KernelError, match=said):
        on_gpu(gpu, new_size, PreprocessConfig(), picture(*frame))


def test_an_odd_nv12_frame_is_refused(gpu: Gpu):
    luma, chroma = nv12(30, 30)
    with pytest.raises(KernelError, match=r"even sides for NV12, found 29x30"):
        on_gpu(gpu, (28, 28), PreprocessConfig(), luma[:, :29], chroma[:, :14])


def test_an_output_that_is_not_aligned_is_refused(gpu: Gpu):
    config, whole = PreprocessConfig(), gpu.empty(4 * 3 * 14 * 14 + 1)
    output = DeviceArray(whole.pointer + 4, (4, 3 * 14 * 14), whole.dtype, (4 * 3 * 14 * 14, 4), whole.owner)
    with pytest.raises(KernelError, match="Frame: expected addresses that are multiples of 16 bytes"):
        operations.patches_of_frame(
            gpu, gpu.array(picture(30, 30)), new_size=(28, 28), patch=14, merge=2, mean=config.image_mean,
            deviation=config.image_std, output=output,
        )  # fmt: skip


def test_the_means_are_those_of_the_checkpoint():
    assert PreprocessConfig().image_mean == CLIP_MEAN and PreprocessConfig().image_std == CLIP_STD

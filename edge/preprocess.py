"""One camera frame to the vision graph's input: resize, normalise, patchify.

Owns the numerics that training, export and runtime must agree on. Knows nothing of graphs, sessions or files.
Follows `smart_resize` and `Qwen2VLImageProcessor` of transformers; the resize is Pillow's bicubic itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class PreprocessConfig:
    """What a checkpoint's `preprocessor_config.json` decides about frames."""

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 100352
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @property
    def factor(self) -> int:
        """Side of one visual token, in pixels."""
        return self.patch_size * self.merge_size


def smart_resize(height: int, width: int, config: PreprocessConfig) -> tuple[int, int]:
    """The (height, width) a frame is resized to: multiples of `factor`, within the pixel limits, aspect nearly kept.

    Raises:
      ValueError: the frame is empty or more than 200 times longer than wide.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a frame needs at least 1x1 pixels, found {width}x{height}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"aspect ratio must be at most {MAX_ASPECT_RATIO}, found {width}x{height}")
    factor = config.factor
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > config.max_pixels:
        scale = math.sqrt(height * width / config.max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < config.min_pixels:
        scale = math.sqrt(config.min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def resize_frame(frame: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """Resize an RGB frame to the model's size with Pillow's bicubic filter.

    Args:
      frame: (H, W, 3) uint8 RGB.

    Returns:
      (H', W', 3) uint8; `frame` itself where the size is already right.
    """
    height, width = smart_resize(frame.shape[0], frame.shape[1], config)
    return frame if frame.shape[:2] == (height, width) else resize_to(frame, height, width)


def resize_to(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an RGB frame (H, W, 3) uint8 with Pillow's bicubic filter: lines first, rounded, then columns.

    Said in two steps because Pillow takes the columns first for some shapes from version 13 on: one model should see
    the same pixels with every version, and on a GPU.
    """
    from PIL import Image

    image = Image.fromarray(frame).resize((width, frame.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def grid_of(height: int, width: int, config: PreprocessConfig) -> tuple[int, int]:
    """Patches (rows, columns) of a resized frame."""
    return height // config.patch_size, width // config.patch_size


def patchify(resized: np.ndarray, config: PreprocessConfig) -> np.ndarray:
    """Normalise a resized frame and cut it into the vision tower's patches.

    Rows are grouped by 2x2 merge block (block row, block column, row in block, column in block); columns are
    channel, row, column. The tower's patches have a time axis too, of which a single image fills every step alike;
    the vision graph's weights are summed over it, so it is left out here.

    Args:
      resized: (H, W, 3) uint8, H and W multiples of `factor`.

    Returns:
      (rows * columns, 3 * patch_size**2) float32, C-contiguous.
    """
    patch, merge = config.patch_size, config.merge_size
    rows, columns = grid_of(resized.shape[0], resized.shape[1], config)
    mean = np.asarray(config.image_mean, np.float32) * np.float32(255)
    std = np.asarray(config.image_std, np.float32) * np.float32(255)
    pixels = (resized.astype(np.float32) - mean) / std
    blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, row, column, channel, y, x
    return np.ascontiguousarray(blocks).reshape(rows * columns, 3 * patch * patch)

"""A checkpoint folder of a public model's shape with random weights, to measure an export without the model.

Owns the files: bfloat16 shards with an index under the names of the published checkpoints, a tokenizer with the three
states, the image processor's file. The values repeat one random block, at the spread that keeps activations finite.

    python -m apps.bench.random_checkpoint FOLDER --size 3B
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from apps.bench.qwen_configs import SIZES, public_config

BLOCK_VALUES = (1 << 24) + 3
"""Odd, so that the repetition never falls into step with rows."""
SHARD_BYTES = 4 << 30
ADDED_GAIN = 0.2
"""How much a random layer adds to its input, so that numbers stay of one size through all of them."""
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")

TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def write_checkpoint(folder: Path, size: str, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the folder. Returns the bytes of its weights.

    Args:
      size: one of `SIZES`.
      shard_bytes: a shard ends with the tensor that passes it.
    """
    from export.config import facts_from_config
    from export.tensor_names import expected_shapes

    demo = Path(__file__).parent.parent / "demo" / "checkpoint"
    trained = json.loads((demo / "config.json").read_text())
    config = public_config(size) | {key: trained[key] for key in TOKEN_KEYS}  # the demonstration's tokenizer
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in SMALL_FILES:
        shutil.copy(demo / name, folder / name)
    block = np.random.default_rng(seed).standard_normal(BLOCK_VALUES, np.float32)
    shapes = {_published_name(name): shape for name, shape in expected_shapes(facts_from_config(config)).items()}
    shards = list(_shards(shapes, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file_name, {name: shapes[name] for name in names}, block)
        weight_map.update(dict.fromkeys(names, file_name))
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _published_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def _shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        names.append(name)
        filled += 2 * math.prod(shape)
        if filled >= shard_bytes:
            yield names
            names, filled = [], 0
    if names:
        yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            mean, spread = _distribution(name, shape)
            left, first = math.prod(shape), len(name) * 7919 % len(block)
            while left:
                values = mean + np.float32(spread) * block[first : first + left]
                (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tofile(file)
                left, first = left - len(values), 0


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if "norm" in name or "ln_q" in name:
        return 1.0, 0.05
    if len(shape) == 1:
        return 0.0, 0.05
    gain = ADDED_GAIN if "o_proj" in name or "down_proj" in name or "attn.proj" in name else 1.0
    return 0.0, gain * math.prod(shape[1:]) ** -0.5


def main() -> None:
    """Write a checkpoint of the size that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="3B")
    arguments = parser.parse_args()
    total = write_checkpoint(arguments.folder, arguments.size)
    print(f"{arguments.folder}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()

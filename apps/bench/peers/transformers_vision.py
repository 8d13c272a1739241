"""Another runtime beside ours: the vision tower of Qwen2.5-VL in transformers, float32, random weights.

A script of its own. Answers requests as `apps.bench.model_worker` does.

    python transformers_vision.py '{"depth": 32, "hidden_size": 1280, ...}' --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

SETTLE_S = 0.05
PATCH, TEMPORAL = 14, 2


class Tower:
    """The model, evaluated without gradients."""

    def __init__(self, shape: dict[str, Any], threads: int) -> None:
        import torch
        from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

        torch.set_num_threads(threads)
        self._torch = torch
        config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            depth=shape["depth"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_heads=shape["num_heads"],
            out_hidden_size=shape["out_hidden_size"],
            window_size=shape["window_size"],
            fullatt_block_indexes=list(shape["full_attention_blocks"]),
        )
        config._attn_implementation = "sdpa"
        self._model = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config).float().eval()

    def measure(self, rows: int, columns: int) -> float:
        """Milliseconds of one frame."""
        torch = self._torch
        patches = torch.randn(rows * columns, 3 * TEMPORAL * PATCH**2)
        grid = torch.tensor([[1, rows, columns]])
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        with torch.inference_mode():
            self._model(patches, grid_thw=grid)
        return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import transformers

    tower = Tower(json.loads(args.shape), args.threads)
    print(json.dumps({"ready": f"transformers {transformers.__version__}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"ms": tower.measure(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()

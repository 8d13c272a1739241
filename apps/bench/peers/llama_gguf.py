"""A decoder of Qwen2.5's shape with random 4-bit weights as a GGUF file, for llama.cpp's `llama-bench`.

Owns the file's contents: Q4_0 matrices that differ by layer, float32 norms and biases, no vocabulary. A script of its
own; it needs the package `gguf`.

    python llama_gguf.py '{"layers": 36, "hidden_size": 2048, ...}' model.gguf
    llama-bench -m model.gguf -t 2 -p 144 -n 1 -d 0,4096
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

BLOCK, BLOCK_BYTES = 32, 18
"""Q4_0: a float16 scale and 16 bytes of codes for every 32 weights."""


def quantised(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """(rows, bytes of a row) uint8 of random Q4_0 blocks."""
    blocks = rows * columns // BLOCK
    content = np.frombuffer(random.bytes(blocks * BLOCK_BYTES), np.uint8).reshape(blocks, BLOCK_BYTES).copy()
    content[:, :2] = (random.random(blocks) * 0.01 + 0.005).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    return content.reshape(rows, columns // BLOCK * BLOCK_BYTES)


def write(shape: dict[str, int], path: str) -> None:
    """Write the whole model."""
    import gguf

    random = np.random.default_rng(5)
    writer: Any = gguf.GGUFWriter(path, "qwen2")
    hidden, heads, kv_heads, width = (shape[name] for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"))
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, quantised(random, rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def vector(name: str, values: int) -> None:
        writer.add_tensor(name, np.ones(values, np.float32))

    matrix("token_embd.weight", shape["vocab_size"], hidden)
    vector("output_norm.weight", hidden)
    for layer in range(shape["layers"]):
        prefix = f"blk.{layer}."
        vector(prefix + "attn_norm.weight", hidden)
        vector(prefix + "ffn_norm.weight", hidden)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            matrix(f"{prefix}attn_{part}.weight", count * width, hidden)
            vector(f"{prefix}attn_{part}.bias", count * width)
        matrix(prefix + "attn_output.weight", hidden, heads * width)
        matrix(prefix + "ffn_gate.weight", shape["intermediate_size"], hidden)
        matrix(prefix + "ffn_up.weight", shape["intermediate_size"], hidden)
        matrix(prefix + "ffn_down.weight", hidden, shape["intermediate_size"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(json.loads(sys.argv[1]), sys.argv[2])

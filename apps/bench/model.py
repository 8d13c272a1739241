"""Whole models of random weights, ours beside the stock graph and other runtimes: append, decode, one frame.

Owns which rows are measured and against whom. Each contestant is a process (`workers`), all of them alive at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apps.bench import random_model, timing
from apps.bench.random_model import TOWERS, ModelFiles
from apps.bench.timing import Work
from apps.bench.workers import Worker, graph_command
from edge.contract import DecoderFacts

NEW_TOKENS, DEPTH = 144, 4096
FRAME_ROWS, FRAME_COLUMNS = 16, 30
PEERS = Path(__file__).resolve().parent / "peers"
DECODER_GOALS = {
    (NEW_TOKENS, 0): {"OpenVINO": 1.2},
    (NEW_TOKENS, DEPTH): {"OpenVINO": 2.5, "llama.cpp": 4.0},
    (1, 0): {timing.FASTEST: 1.0, timing.PEAK: 0.7},
    (1, DEPTH): {timing.FASTEST: 1.0, timing.PEAK: 0.7},
}
"""By new tokens and depth."""


@dataclass(frozen=True)
class Peers:
    """Other runtimes, where the user says they are.

    Attributes:
      openvino_python: a Python that has the package `openvino`.
      transformers: whether to take transformers along, from this Python.
      llama_bench: llama.cpp's program and a GGUF file of the same shape.
    """

    openvino_python: str | None = None
    transformers: bool = False
    llama_bench: tuple[str, str] | None = None


def measure(
    folder: Path,
    threads: int,
    rounds: int,
    *,
    size: str = random_model.BASE,
    layers: int | None = None,
    block: int = 128,
    peers: Peers = Peers(),
) -> list[dict[str, Any]]:
    """All rows of one size and number of threads. Writes the graphs into `folder` (1.9 GB for 3B)."""
    files = random_model.make(folder, size=size, layers=layers, block=block)
    facts = random_model.decoder_facts(size, layers)
    rows = _decoder_rows(files, facts, size, threads, rounds, block, peers)
    return rows + _vision_rows(files, size, threads, rounds, peers)


def _decoder_rows(
    files: ModelFiles, facts: DecoderFacts, size: str, threads: int, rounds: int,
    block: int, peers: Peers,
) -> list[dict[str, Any]]:  # fmt: skip
    capacity = max(depth + tokens for tokens, depth in DECODER_GOALS)
    commands = {
        "ours": graph_command(files.graph("decoder", "ours"), threads, capacity, size),
        "ONNX Runtime": graph_command(files.graph("decoder", "stock"), threads, capacity, size),
    }
    if peers.openvino_python:
        script, shape = str(PEERS / "openvino_peer.py"), json.dumps(_shape(facts))
        options = ["--threads", str(threads), "--block", str(block)]
        commands["OpenVINO"] = [peers.openvino_python, script, "decoder", shape, *options]
    if peers.llama_bench:
        script = str(PEERS / "llama_bench.py")
        commands["llama.cpp"] = [sys.executable, script, *peers.llama_bench, "--threads", str(threads)]
    rows = []
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, command)) for name, command in commands.items()}
        for (tokens, depth), goals in DECODER_GOALS.items():
            request = {"tokens": tokens, "depth": depth}
            times = timing.interleave({name: worker.contestant(request) for name, worker in workers.items()}, rounds)
            name = f"append {tokens} tokens" if tokens > 1 else "decode one token"
            shape_text = f"{size}, {facts.layers} layers, 4-bit/{block}, int8 KV, depth {depth}"
            work = decoder_work(facts, tokens, depth, block)
            rows.append(timing.row(name, shape_text, threads, times, work, goals))
    return rows


def _vision_rows(files: ModelFiles, size: str, threads: int, rounds: int, peers: Peers) -> list[dict[str, Any]]:
    commands = {
        "ours": graph_command(files.graph("vision", "ours"), threads, 1, size),
        "ONNX Runtime": graph_command(files.graph("vision", "stock"), threads, 1, size),
    }
    if peers.transformers:
        script = str(PEERS / "transformers_vision.py")
        commands["transformers"] = [sys.executable, script, json.dumps(asdict(TOWERS[size])), "--threads", str(threads)]
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, command)) for name, command in commands.items()}
        request = {"rows": FRAME_ROWS, "columns": FRAME_COLUMNS}
        times = timing.interleave({name: worker.contestant(request) for name, worker in workers.items()}, rounds)
    shape = f"{size}, {FRAME_COLUMNS * 14}x{FRAME_ROWS * 14} frame, 8-bit"
    return [timing.row("vision tower", shape, threads, times, vision_work(size), {"transformers": 3.0})]


def decoder_work(facts: DecoderFacts, tokens: int, depth: int, block: int) -> Work:
    """Operations and bytes of one call: every weight once, the head for one token, the cache once per layer."""
    width, inner = facts.hidden_size, facts.intermediate_size
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    rest = queries * width + 3 * width * inner
    weights = facts.layers * (width * (queries + 2 * keys) + rest)
    head = width * facts.vocab_size
    attention = facts.layers * 4 * tokens * queries * (depth + (tokens + 1) / 2)
    stored = weights * (0.5 + 4 / block) + head * (1 + 4 / random_model.HEAD_BLOCK)
    cache = facts.layers * 2 * facts.num_kv_heads * (facts.head_dim + 4) * depth
    bound = "int8_gops" if tokens > 1 else "read_gbs"
    not_needed = (tokens - 1) * rest  # behind the last layer's keys and values only the last token counts
    return Work(2 * (weights * tokens - not_needed) + 2 * head + attention, stored + cache, bound)


def vision_work(size: str) -> Work:
    """Operations of one frame."""
    tower, patches = TOWERS[size], FRAME_ROWS * FRAME_COLUMNS
    width, merged = tower.hidden_size, tower.hidden_size * random_model.MERGE**2
    linear = tower.depth * (4 * width**2 + 3 * width * tower.intermediate_size) * patches
    merger = merged * (merged + tower.out_hidden_size) * patches / random_model.MERGE**2
    full = len(tower.full_attention_blocks)
    window = (tower.window_size // random_model.PATCH) ** 2
    pairs = patches * (full * patches + (tower.depth - full) * window)
    weights = tower.depth * (4 * width**2 + 3 * width * tower.intermediate_size) + merged * (merged + width)
    return Work(2 * (linear + merger) + 4 * pairs * width, weights * 1.125, "int8_gops")


def _shape(facts: DecoderFacts) -> dict[str, int]:
    names = ("layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return {name: getattr(facts, name) for name in names}

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

from apps.bench import random_bundle, timing
from apps.bench.decoder_worker import FRAME_COLUMNS, FRAME_ROWS
from apps.bench.random_bundle import Recipe
from apps.bench.timing import Work
from apps.bench.workers import Worker, bundle_command
from edge.contract import DecoderFacts
from edge.errors import UsageError
from export.config import ModelFacts
from export.plan import value_bytes

NEW_TOKENS, DEPTH = 144, 4096
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
    size: str = "3B",
    layers: int | None = None,
    block: int = 128,
    peers: Peers = Peers(),
) -> list[dict[str, Any]]:
    """All rows of one size and number of threads. Writes a bundle into `folder` (2.8 GB for 3B), unless it is there.

    Raises:
      UsageError: a package that export needs is missing, or a peer.
    """
    recipe = Recipe(f"qwen2.5-vl-{size.lower()}", block=block, layers=layers)
    try:
        path = random_bundle.find(recipe, folder) or random_bundle.make(recipe, folder, lambda *_: None)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Whole models are written by the export stage, which needs the package `{error.name}`; it is missing",
            hint="pip install 'streamo-edge[demo]', or leave them out with `--only attention,matmul`",
        ) from None
    capacity = max(depth + tokens for tokens, depth in DECODER_GOALS)
    with contextlib.ExitStack() as stack:

        def start(name: str, command: list[str]) -> Worker:
            return stack.enter_context(Worker(name, command))

        workers = {
            "ours": start("ours", bundle_command(path, threads, capacity)),
            "ONNX Runtime": start("ONNX Runtime", bundle_command(path, threads, capacity, stock=True)),
        }
        rows = _decoder_rows(workers, recipe, size, threads, rounds, peers)
        return [*rows, _vision_row(workers, recipe, size, threads, rounds, peers)]


def _decoder_rows(
    workers: dict[str, Worker], recipe: Recipe, size: str, threads: int, rounds: int, peers: Peers
) -> list[dict[str, Any]]:
    facts, block, commands = recipe.facts.decoder, recipe.block, {}
    if peers.openvino_python:
        script, shape = str(PEERS / "openvino_peer.py"), json.dumps(_shape(facts))
        options = ["--threads", str(threads), "--block", str(block)]
        commands["OpenVINO"] = [peers.openvino_python, script, "decoder", shape, *options]
    if peers.llama_bench:
        script = str(PEERS / "llama_bench.py")
        commands["llama.cpp"] = [sys.executable, script, *peers.llama_bench, "--threads", str(threads)]
    rows = []
    with contextlib.ExitStack() as stack:
        others = {name: stack.enter_context(Worker(name, command)) for name, command in commands.items()}
        for (tokens, depth), goals in DECODER_GOALS.items():
            times = _times({**workers, **others}, {"tokens": tokens, "depth": depth}, rounds)
            name = f"append {tokens} tokens" if tokens > 1 else "decode one token"
            shape_text = f"{size}, {facts.layers} layers, 4-bit/{block}, int8 KV, depth {depth}"
            work = decoder_work(facts, tokens, depth, block)
            rows.append(timing.row(name, shape_text, threads, times, work, goals))
    return rows


def _vision_row(
    workers: dict[str, Worker], recipe: Recipe, size: str, threads: int, rounds: int, peers: Peers
) -> dict[str, Any]:
    commands = {}
    if peers.transformers:
        script, shape = str(PEERS / "transformers_vision.py"), json.dumps(asdict(recipe.facts.vision))
        commands["transformers"] = [sys.executable, script, shape, "--threads", str(threads)]
    with contextlib.ExitStack() as stack:
        others = {name: stack.enter_context(Worker(name, command)) for name, command in commands.items()}
        times = _times({**workers, **others}, {"rows": FRAME_ROWS, "columns": FRAME_COLUMNS}, rounds)
    shape_text = f"{size}, {FRAME_COLUMNS * 14}x{FRAME_ROWS * 14} frame, 8-bit"
    work = vision_work(recipe.facts, recipe.block)
    return timing.row("vision tower", shape_text, threads, times, work, {"transformers": 3.0})


def _times(workers: dict[str, Worker], request: dict[str, int], rounds: int) -> Any:
    return timing.interleave({name: worker.contestant(request) for name, worker in workers.items()}, rounds)


def decoder_work(facts: DecoderFacts, tokens: int, depth: int, block: int) -> Work:
    """Operations and bytes of one call: every weight once, the head for one token, the cache once per layer."""
    width, inner = facts.hidden_size, facts.intermediate_size
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    rest = queries * width + 3 * width * inner
    weights = facts.layers * (width * (queries + 2 * keys) + rest)
    head = width * facts.vocab_size
    attention = facts.layers * 4 * tokens * queries * (depth + (tokens + 1) / 2)
    stored = weights * value_bytes("int4", block) + head * value_bytes("int8", block)
    cache = facts.layers * 2 * facts.num_kv_heads * (facts.head_dim + 4) * depth
    bound = "int8_gops" if tokens > 1 else "read_gbs"
    not_needed = (tokens - 1) * rest  # behind the last layer's keys and values only the last token counts
    return Work(2 * (weights * tokens - not_needed) + 2 * head + attention, stored + cache, bound)


def vision_work(facts: ModelFacts, block: int) -> Work:
    """Operations of one frame."""
    tower, patches = facts.vision, FRAME_ROWS * FRAME_COLUMNS
    width, merged = tower.hidden_size, tower.hidden_size * facts.merge_size**2
    linear = tower.depth * (4 * width**2 + 3 * width * tower.intermediate_size) * patches
    merger = merged * (merged + tower.out_hidden_size) * patches / facts.merge_size**2
    full = len(tower.full_attention_blocks)
    window = (tower.window_size // facts.patch_size) ** 2
    pairs = patches * (full * patches + (tower.depth - full) * window)
    weights = tower.depth * (4 * width**2 + 3 * width * tower.intermediate_size) + merged * (merged + width)
    return Work(2 * (linear + merger) + 4 * pairs * width, weights * value_bytes("int8", block), "int8_gops")


def _shape(facts: DecoderFacts) -> dict[str, int]:
    names = ("layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return {name: getattr(facts, name) for name in names}

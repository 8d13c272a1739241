"""`streamo-edge bench decoder`: what a device can do with a model of a known shape, before any training.

Owns the checks before anything is written or loaded, and the result. A random bundle comes from `random_bundle`, its
times from a process of its own (`decoder_worker`), the machine's peaks from `peaks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apps.bench import gpu, peaks, random_bundle
from apps.bench.machine import available_cores, machine_card
from apps.bench.random_bundle import Progress, Recipe
from apps.bench.workers import ROOT
from edge import native
from edge.backends import free_bytes
from edge.bundle import Bundle, open_bundle
from edge.contract import kv_layer_bytes
from edge.decoder import MAX_PREFILL_TOKENS
from edge.errors import BackendError, EdgeError, MemoryBudgetError, UsageError
from edge.memory import bytes_text

LOADED_FACTOR = {"int4": 1.3, "int8": 1.3, "fp16": 4.0, "fp32": 2.0}
"""Memory that a stored byte takes at most while native graphs are loaded: the mapped file and what is packed of it.
Pages of int4 and int8 weights are given back as they are packed: a 3B took 1.04 and 1.02."""
STOCK_LOADED_FACTOR = 4.0
BASE_BYTES = 200 << 20
PEAK_ROUNDS = 3

Say = Callable[[str], None]


def measure(
    recipe: Recipe,
    depths: list[int],
    tokens: int,
    *,
    backend: str = "cpu",
    folder: Path | None = None,
    threads: int | None = None,
    repeats: int = 3,
    progress: Progress,
    say: Say,
) -> dict[str, Any]:
    """Make the bundle if it is not there yet, and time it.

    Args:
      depths: cached tokens behind which is measured.
      tokens: new tokens of an append.
      backend: what runs it: cpu or cuda.
      folder: where bundles are kept; None for the user's cache.
      say: told what is written and where, before it is.

    Returns:
      `vision_ms` for a 420x224 frame, `append_ms`, `turns_per_s` and `decode_ms_per_token` by depth, `rss_peak_mb`,
      the machine's `peaks`, and what it was measured with.

    Raises:
      UsageError: depths or tokens that cannot be measured.
      MemoryBudgetError: weights and cache do not fit; OutputError: the bundle does not fit on the disk.
      DeviceError: there is no GPU for the backend.
    """
    check_lengths(depths, tokens)
    threads = threads or available_cores()
    _check_memory(recipe, backend, max(depths) + tokens)
    bundle = open_bundle(_prepare(recipe, folder, progress, say), verify=False)
    best = _peaks(backend, threads)
    found = _run_worker(bundle, backend, threads, depths, tokens, repeats, progress)
    best = peaks.best_of(best, _peaks(backend, threads))
    manifest = bundle.manifest
    for notice in found.pop("notices"):
        say(notice)
    kv_bytes = manifest.kv_bytes_per_token if found["native"] else manifest.stock_kv_bytes_per_token
    return {
        "shape": recipe.shape,
        "weights": recipe.weights,
        "kv": recipe.kv if found["native"] else "fp32",
        "block": recipe.block,
        "tokens": tokens,
        "backend": backend,
        **found,
        "peaks": best.get(str(threads), {}),
        "instruction_set": native.instruction_set() if native.available() is None else None,
        "repeats": repeats,
        "bundle": str(bundle.path),
        "bundle_bytes": sum(facts.bytes for facts in manifest.files.values()),
        "decoder_weights_bytes": manifest.decoder.weights_bytes,
        "kv_bytes_per_token": kv_bytes,
        "read_fraction_of_peak": _read_fractions(found, manifest.decoder.weights_bytes, kv_bytes, best, threads),
        "machine": machine_card(threads),
    }


def check_lengths(depths: list[int], tokens: int) -> None:
    """Refuse what cannot be measured.

    Raises:
      UsageError: names the option.
    """
    if not 1 <= tokens <= MAX_PREFILL_TOKENS:
        raise UsageError(
            f"An append has 1 to {MAX_PREFILL_TOKENS} tokens, found {tokens}",
            hint="A longer prompt is given to the model in parts; measure one of them",
        )
    if not depths or min(depths) < 0:
        raise UsageError(f"Depths are numbers of cached tokens, 0 or more, found {depths}")


def _prepare(recipe: Recipe, folder: Path | None, progress: Progress, say: Say) -> Path:
    """The bundle's folder."""
    folder = default_folder() if folder is None else folder
    path = random_bundle.find(recipe, folder)
    if path is None:
        say(f"Writing {bytes_text(recipe.bytes)} of random weights to `{folder / recipe.name}`, kept for the next time")
        path = random_bundle.make(recipe, folder, progress)
    return path


def default_folder() -> Path:
    """The user's cache."""
    from edge.user_cache import user_cache_folder

    return user_cache_folder() / "random"


def _check_memory(recipe: Recipe, backend: str, capacity_tokens: int) -> None:
    """Refuse a bundle whose weights and cache do not fit, before it is written."""
    facts, free = recipe.facts.decoder, free_bytes(backend)
    is_native = native.available() is None
    dtype = "int8" if recipe.kv == "int8" and is_native else "float32"
    cache = capacity_tokens * facts.layers * kv_layer_bytes(facts, dtype)
    embedding_bytes = recipe.embedding_bytes  # mapped, and read only where a token needs it
    factor = LOADED_FACTOR[recipe.weights] if is_native else STOCK_LOADED_FACTOR
    if backend != "cpu":
        factor = 2.0 if recipe.weights == "fp16" else 1.0  # as they are, but for float16
    weights = int((recipe.bytes - embedding_bytes) * factor)
    wanted = weights + cache + BASE_BYTES
    if free is not None and wanted > free:
        raise MemoryBudgetError(
            f"{recipe.shape} with {recipe.weights} weights needs about {bytes_text(wanted)} of memory, "
            f"{bytes_text(cache)} of it for a KV cache of {capacity_tokens} tokens; {bytes_text(free)} is free",
            hint="Use smaller `--depth`, smaller `--weights`, or fewer `--layers`",
        )


def _peaks(backend: str, threads: int) -> dict[str, dict[str, float]]:
    """The machine's peaks, and of a GPU the rate of a copy, in which half of the bytes are read."""
    if backend != "cpu":
        return {str(threads): {"copy_gbs": gpu.copy_gbs()}}
    return peaks.measure([threads], PEAK_ROUNDS) if native.available() is None else {}


def _read_fractions(
    found: dict[str, Any], weights_bytes: int, kv_bytes: int, best: dict[str, dict[str, float]], threads: int
) -> dict[str, float]:
    """By depth: the rate at which decoding reads weights and cache, as a part of the machine's own."""
    if str(threads) not in best:
        return {}
    rates = best[str(threads)]
    read_gbs = rates["read_gbs"] if "read_gbs" in rates else rates["copy_gbs"]
    least_ms = found["decode_min_ms_per_token"]
    found_gbs = {depth: (weights_bytes + int(depth) * kv_bytes) / ms / 1e6 for depth, ms in least_ms.items()}
    return {depth: round(rate / read_gbs, 3) for depth, rate in found_gbs.items()}


def _run_worker(
    bundle: Bundle, backend: str, threads: int, depths: list[int], tokens: int, repeats: int, progress: Progress
) -> dict[str, Any]:
    """The times, from a process of its own."""
    depth_list = ",".join(map(str, depths))
    options = f"--backend {backend} --threads {threads} --depths {depth_list} --tokens {tokens} --repeats {repeats}"
    command = [sys.executable, "-m", "apps.bench.decoder_worker", str(bundle.path.resolve()), *options.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        with process:
            try:
                return _follow(process, errors, progress)
            finally:
                process.kill()


def _follow(process: subprocess.Popen[str], errors: Any, progress: Progress) -> dict[str, Any]:
    assert process.stdout is not None
    progress("load", 0, 1)
    for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            error = MemoryBudgetError if message["code"] == MemoryBudgetError.exit_code else BackendError
            raise error(message["error"], hint=message["hint"])
        if "result" in message:
            return dict(message["result"])
        progress("measure", message["done"], message["total"])
    raise _ended(process, errors)


def _ended(process: subprocess.Popen[str], errors: Any) -> EdgeError:
    code = process.wait()
    if code == -9:
        return MemoryBudgetError(
            "The process that measures was killed, which the system does when memory runs out",
            hint="Use smaller `--depth` or smaller `--weights`, or end other programs",
        )
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    return BackendError(f"The process that measures ended with code {code}: {said[-1] if said else 'it said nothing'}")

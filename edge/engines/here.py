"""This machine's TensorRT, plugin and GPU, put together to a store of engines.

Owns the order in which they are looked for, so that the first thing that is missing is the one that is told.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from edge import gpu_abi
from edge.bundle import Bundle
from edge.engines.builder import BuildOptions
from edge.engines.plugin import find_plugin, load_plugin
from edge.engines.store import Device, EngineStore
from edge.engines.toolkit import load_tensorrt
from edge.gpu import Gpu


def open_store(
    bundle: Bundle,
    *,
    folder: Path | None = None,
    options: BuildOptions | None = None,
    ignore_memory: bool = False,
    on_loss: Callable[[], None] | None = None,
) -> tuple[Gpu, EngineStore]:
    """The GPU, opened, and the bundle's engines for it. Arguments as those of `EngineStore` and `Gpu`.

    TensorRT uses the process's first GPU, so that is the one.

    Raises:
      EngineError: TensorRT or the plugin is missing or does not fit. DeviceError: no GPU.
    """
    toolkit = load_tensorrt()
    plugin = find_plugin(toolkit)
    gpu = Gpu(0, on_loss=on_loss)
    facts = gpu.facts
    device = Device(facts.name, facts.sm, facts.free_bytes, facts.integrated)
    load_plugin(toolkit, plugin)
    store = EngineStore(bundle, toolkit, plugin, device, table_words, folder, options or BuildOptions(), ignore_memory)
    return gpu, store


def table_words(new_tokens: int, capacity: int, most_spans: int) -> int:
    """Words of an attention table for these sizes."""
    found = ctypes.c_size_t()
    library = gpu_abi.load_library()
    gpu_abi.accept(library.streamo_gpu_attention_table_bytes(new_tokens, capacity, most_spans, ctypes.byref(found)))
    return -(-found.value // 4)

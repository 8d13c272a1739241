"""A small bundle, a fake TensorRT and a fake GPU, put together for the tests of engines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu
from fake_tensorrt import World, make_module
from tensorrt_operators import table_of

from edge import gpu_operations
from edge.bundle import Bundle, open_bundle
from edge.engines import here, plugin
from edge.engines.store import EngineStore, Listener


@dataclass
class Device:
    """What a test sees of the device it runs on."""

    bundle: Bundle
    folder: Path
    gpu: FakeGpu
    monkeypatch: pytest.MonkeyPatch
    world: World = field(default_factory=lambda: World("10.3.0"))

    def install(self, version: str) -> World:
        """Have TensorRT `version` and a plugin built for it."""
        self.world = install_tensorrt(version, self.folder, self.monkeypatch)
        return self.world

    def store(self, **options: Any) -> EngineStore:
        """The store that the backend and the command would open."""
        return here.open_store(self.bundle, folder=self.folder / "engines", **options)[1]


def install_tensorrt(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Put a fake TensorRT `version` in place of the real one, and a file in `folder` in place of the plugin."""
    module, world = make_module(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    major, minor = (int(part) for part in version.split(".")[:2])
    monkeypatch.setattr(plugin, "_loaded", {})
    library = folder / "libstreamo_tensorrt.so"
    library.write_bytes(f"plugin for {major}.{minor}".encode())
    monkeypatch.setenv(plugin.PLUGIN_VARIABLE, str(library))
    said = SimpleNamespace(
        streamo_tensorrt_version=lambda: 10000 * major + 100 * minor,
        streamo_tensorrt_sources=lambda: b"",
        streamo_tensorrt_messages=lambda: world.take_refusals(),
    )
    monkeypatch.setattr(plugin, "_open", lambda path: said)
    return world


def table_words(new_tokens: int, capacity: int, most_spans: int) -> int:
    """Of `tensorrt_operators.table_of`'s tables."""
    return 2 + new_tokens + 3 * most_spans


@dataclass
class Heard:
    """What a listener was told."""

    sentences: list[str] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def listener(self) -> Listener:
        return Listener(self.sentences.append, lambda *step: self.steps.append(step))


def small_bundle(folder: Path, *, weights: str = "int4", kv: str = "int8") -> Path:
    """Random weights, of which TensorRT multiplies with some itself and with others it does not."""
    from tiny_checkpoint import write_checkpoint

    from export.api import export_checkpoint

    write_checkpoint(folder / "checkpoint")
    export_checkpoint(folder / "checkpoint", folder / "bundle", weights=weights, kv=kv, block_size=64)
    return folder / "bundle"


def make_device(bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device with TensorRT 10.3 on which `bundle` lies."""
    gpu = FakeGpu()

    def attention_table(
        new_slots: np.ndarray, spans: np.ndarray, *, capacity: int, run_count: int, most_spans: int
    ) -> np.ndarray:
        assert len(spans) <= most_spans and new_slots.max() < capacity and run_count >= 1
        table = np.zeros(table_words(len(new_slots), capacity, most_spans), np.int32)
        used = table_of(new_slots, spans)
        table[: len(used)] = used
        return table.view(np.uint8)

    def opened(device: int, on_loss: Any = None) -> FakeGpu:
        gpu.on_loss = on_loss or gpu.on_loss
        return gpu

    monkeypatch.setattr(here, "Gpu", opened)
    monkeypatch.setattr(here, "table_words", table_words)
    monkeypatch.setattr(gpu_operations, "attention_table", attention_table)
    device = Device(open_bundle(bundle), folder, gpu, monkeypatch)
    device.install("10.3.0")
    yield device

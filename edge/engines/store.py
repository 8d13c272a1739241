"""A bundle's engines for this device: found if they fit, built if not.

Owns what an engine depends on, where it is kept, and the order of checks. Engines are a cache: the folder
`BUNDLE.engines` beside the bundle may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge import contract
from edge.bundle import Bundle
from edge.contract import Component
from edge.engines.builder import BuildOptions, build_engine
from edge.engines.engine_file import EngineKey, only_builder, opened_engine, unusable, write_engine
from edge.engines.plugin import Plugin
from edge.engines.preflight import build_memory, check_disk, check_memory
from edge.engines.profiles import Profile, TableWords, decoder_profiles, vision_profiles
from edge.engines.progress import Report
from edge.engines.toolkit import TensorRT
from edge.errors import EngineError

DATA_FILES = {"vision": ("vision.data",), "decoder": ("decoder.data", contract.TENSORRT_DATA_FILE)}
COMPONENTS = ("vision", "decoder")


@dataclass(frozen=True)
class Device:
    """The GPU that engines are for."""

    name: str
    sm: int
    free_bytes: int
    integrated: bool


@dataclass(frozen=True)
class StoredEngine:
    """An engine that is there now.

    Attributes:
      found: whether it was there already.
      reason: why it was built; "" if it was found.
    """

    component: str
    path: Path
    bytes: int
    seconds: float
    found: bool
    reason: str = ""


@dataclass(frozen=True)
class Listener:
    """Whom to tell what happens.

    Attributes:
      say: a sentence for people. progress: called as (what, done, total).
    """

    say: Callable[[str], None] = lambda text: None
    progress: Report = lambda what, done, total: None


@dataclass(frozen=True)
class EngineStore:
    """The engines of one bundle for one device.

    Args:
      folder: where they are kept; None: beside the bundle.
      ignore_memory: build even if it seems not to fit.
    """

    bundle: Bundle
    toolkit: TensorRT
    plugin: Plugin
    device: Device
    table_words: TableWords
    folder: Path | None = None
    options: BuildOptions = field(default_factory=BuildOptions)
    ignore_memory: bool = False

    def __post_init__(self) -> None:
        for name in COMPONENTS:
            if not self._component(name).tensorrt_file:
                raise EngineError(
                    f"The bundle has no TensorRT graph of its {name}",
                    hint="Export the checkpoint again with this version of streamo-edge; heads must be 64 or 128 wide",
                )

    def path(self, component: str) -> Path:
        """Where the engine of a component is kept."""
        real = self.bundle.path.resolve()
        folder = self.folder or real.with_name(f"{real.name}.engines")
        return folder / f"{component}.sm{self.device.sm}.trt{self.toolkit.text}.engine"

    def key(self, component: str) -> EngineKey:
        """What the engine of a component depends on."""
        files = (self._component(component).tensorrt_file, *DATA_FILES[component])
        hashes = [self.bundle.manifest.files[name].sha256 for name in files if name in self.bundle.manifest.files]
        choices = [[asdict(profile) for profile in self.profiles(component)], asdict(self.options)]
        return EngineKey(
            component=component,
            sources_sha256=_digest(hashes),
            tensorrt=self.toolkit.text,
            sm=self.device.sm,
            device=self.device.name,
            plugin_sha256=self.plugin.sha256,
            profiles_sha256=_digest(choices),
        )

    def profiles(self, component: str) -> list[Profile]:
        """The sizes that a component's engine is built for."""
        manifest = self.bundle.manifest
        return vision_profiles(manifest) if component == "vision" else decoder_profiles(manifest, self.table_words)

    def ensure(
        self, component: str, listener: Listener | None = None, *, force: bool = False, whole: bool = False
    ) -> StoredEngine:
        """The engine of a component, built if it is not there or does not fit.

        Args:
          force: build it even if it fits. whole: read all of one that is there before it is said to fit.

        Raises:
          EngineError: TensorRT cannot build it. MemoryBudgetError, OutputError: no room for it.
        """
        told, path, key = listener or Listener(), self.path(component), self.key(component)
        if not force and unusable(path, key, whole=whole) is None:
            return StoredEngine(component, path, path.stat().st_size, 0.0, found=True)
        started = time.monotonic()
        with only_builder(path, lambda: told.say(f"Another process builds the {component} engine: waiting for it")):
            reason = "--force" if force else unusable(path, key, whole=whole)
            if reason is None:  # somebody else has built it meanwhile
                return StoredEngine(component, path, path.stat().st_size, time.monotonic() - started, found=True)
            reason = "There is none yet" if not path.exists() else reason
            told.say(f"Building the {component} engine for {self.device.name}; this takes minutes. {reason}")
            size = self._build(component, path, key, told)
        return StoredEngine(component, path, size, time.monotonic() - started, found=False, reason=reason)

    @contextmanager
    def opened(self, component: str) -> Iterator[memoryview]:
        """The bytes of a component's engine, for TensorRT to read; checked to the last one."""
        with opened_engine(self.path(component), self.key(component)) as plan:
            yield plan

    def _build(self, component: str, path: Path, key: EngineKey, told: Listener) -> int:
        part = self._component(component)
        check_disk(path.parent, part.weights_bytes)
        if not self.ignore_memory:
            need = build_memory(part.weights_bytes, self.options.workspace_bytes)
            check_memory(component, need, self.device.free_bytes, integrated=self.device.integrated)

        def report(what: str, done: int, total: int) -> None:
            told.progress(f"{component}: {what}", done, total)

        plan = build_engine(
            self.toolkit,
            self.bundle.file(part.tensorrt_file),
            self.profiles(component),
            self.options,
            path.with_name(f"timing.sm{self.device.sm}.trt{self.toolkit.text}.cache"),
            report,
        )
        return write_engine(path, key, plan)

    def _component(self, name: str) -> Component:
        return self.bundle.manifest.vision if name == "vision" else self.bundle.manifest.decoder


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

"""A bundle's graphs as TensorRT engines.

Owns which memory the engines' inputs and outputs are bound to; the KV cache is bound to input and output alike, and the
attention plugin updates it in place. Building and finding engines is `edge.engines`', device memory is `place`'s.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from edge import contract
from edge.backends.base import CacheView
from edge.backends.cache_memory import array_bytes
from edge.backends.device_patches import device_patches
from edge.backends.frame_tables import FrameTableCache
from edge.backends.kv_layout import SLOT_TABLES, cache_shapes, cached_rows
from edge.backends.lost_device import keep_for_ever
from edge.backends.place import DevicePlace
from edge.backends.tensorrt_engine import Engine
from edge.bundle import Bundle
from edge.device_frames import FrameOnDevice
from edge.engines.engine_file import DamagedEngineError
from edge.engines.profiles import MOST_CACHED_TOKENS, MOST_RUNS
from edge.engines.store import COMPONENTS, EngineStore, Listener
from edge.errors import BackendError, MemoryBudgetError
from edge.gpu import Gpu
from edge.gpu_arrays import DeviceArray
from edge.memory import bytes_text
from edge.preprocess import PreprocessConfig
from edge.sampling import Logits


def say(text: str) -> None:
    """A line on stderr: a build takes minutes, and silence would look like a hang."""
    print(text, file=sys.stderr, flush=True)


def _load(store: EngineStore, component: str, gpu: Gpu, stream: int, told: Listener) -> Engine:
    """A component's engine; built again if it is found damaged, which only reading all of it shows."""
    try:
        return Engine(store, component, gpu, stream)
    except DamagedEngineError:
        store.ensure(component, told, whole=True)
        return Engine(store, component, gpu, stream)


class TensorRTBackend:
    """Runs both graphs as TensorRT engines, which are built first if there are none that fit.

    Args:
      bundle: an open bundle.
      listener: whom to tell of a build; None: stderr.
      engines: the folder of the engines; None: beside the bundle.

    Attributes:
      cache: the cache's memory by the graph input's name; empty before `allocate_cache`.
      placement: where each component runs, in words.

    Raises:
      EngineError: TensorRT, the plugin or an engine cannot be used. DeviceError: no GPU.
    """

    evicts_in_place = True

    def __init__(self, bundle: Bundle, *, listener: Listener | None = None, engines: Path | None = None) -> None:
        from edge.engines.here import open_store

        manifest = self._manifest = bundle.manifest
        this = weakref.ref(self)
        self._gpu, store = open_store(bundle, folder=engines, on_loss=lambda: keep_for_ever(this()))
        told = listener or Listener(say=say)
        for component in COMPONENTS:
            store.ensure(component, told)
        stream = self._gpu.make("stream")
        vision, decoder = (_load(store, component, self._gpu, stream, told) for component in COMPONENTS)
        self._frame = vision.execution(0)
        self._steps = [decoder.execution(0), decoder.execution(1)]  # one token, many
        self._has_slot_tables = contract.SLOT_COS in decoder.inputs
        self._frames = FrameTableCache(manifest.vision_facts, manifest.preprocess, native=False)
        where = f"{store.device.name} (SM {store.device.sm / 10:.1f}), TensorRT {store.toolkit.text}"
        self._place = DevicePlace(self._gpu, stream, ("cuda", 0), frozenset(), where)
        self._logits = self._place.result(contract.LOGITS, (1, manifest.decoder_facts.vocab_size))
        self.cache: dict[str, DeviceArray] = {}
        self._slot_tables: list[DeviceArray] = []
        self._capacity = 0
        self.notices: list[str] = []
        self.placement = dict.fromkeys(COMPONENTS, where)
        self.identity = {
            "tensorrt": store.toolkit.text,
            "gpu": store.device.name,
            "sm": str(store.device.sm),
            "plugin": store.plugin.sha256[:12],
        }

    def allocate_cache(self, capacity_tokens: int) -> None:
        if capacity_tokens > MOST_CACHED_TOKENS:
            raise MemoryBudgetError(
                f"The TensorRT engine takes a cache of at most {MOST_CACHED_TOKENS} tokens, {capacity_tokens} are "
                "needed",
                hint="Use a smaller window",
            )
        manifest = self._manifest
        shapes = cache_shapes(
            manifest.decoder_facts,
            manifest.kv_dtypes,
            capacity_tokens,
            has_slot_tables=self._has_slot_tables,
            in_words=True,
        )
        self.cache, self._slot_tables = {}, []  # free what was there first
        wanted, free = sum(map(array_bytes, shapes.values())), self._gpu.facts.free_bytes
        if wanted > free:
            layers = manifest.decoder_facts.layers
            raise MemoryBudgetError(
                f"The KV cache needs {bytes_text(wanted)} for {layers} layers x {capacity_tokens} tokens, "
                f"{bytes_text(free)} of GPU memory is free",
                hint="Use a smaller window",
            )
        self._capacity, self.cache = capacity_tokens, self._place.allocate(shapes)
        self._slot_tables = [self.cache[name] for name in SLOT_TABLES if name in self.cache]
        for step in self._steps:
            step.bind_output(contract.LOGITS, self._logits)
            for name, array in self.cache.items():
                step.bind_input(name, array)
                if name not in SLOT_TABLES:
                    step.bind_output(contract.updated(name), array)

    def free_bytes(self) -> int | None:
        """GPU memory that is left."""
        return self._place.free_bytes()

    def embeds_buffer(self, tokens: int) -> Any:
        """What a decoder gathers a run's embeddings in: takes and gives rows of (tokens, W) by slices."""
        return self._place.row_buffer(tokens, self._manifest.decoder_facts.hidden_size)

    def patches_of_frame(
        self, frame: FrameOnDevice, size: tuple[int, int], preprocess: PreprocessConfig
    ) -> DeviceArray:
        """See `device_patches`; the vision engine takes patches in that order."""
        return device_patches(self._place, frame, size, preprocess)

    def encode(self, patches: Any, rows: int, columns: int) -> Any:
        tables = self._frames.of(rows, columns)
        for name, values in {contract.PATCHES: patches, **tables.feeds}.items():
            self._frame.bind_input(name, self._there(name, values))
        tokens = rows * columns // self._manifest.preprocess.merge_size**2
        found = self._place.result(contract.IMAGE_EMBEDS, (tokens, self._manifest.vision_facts.out_hidden_size))
        self._frame.bind_output(contract.IMAGE_EMBEDS, found)
        self._frame.run()
        return self._place.rows(found, tables.token_places)

    def run_decoder(self, inputs_embeds: Any, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView) -> Logits:
        step = self._steps[0 if len(rope_cos) == 1 else 1]
        feeds = {
            contract.INPUTS_EMBEDS: inputs_embeds,
            contract.ROPE_COS: rope_cos,
            contract.ROPE_SIN: rope_sin,
            contract.RUN_COS: view.run_cos,
            contract.RUN_SIN: view.run_sin,
            contract.ATTENTION_TABLE: self._table(view),
        }
        for name, values in feeds.items():
            step.bind_input(name, self._there(name, values))
        for table, values in zip(self._slot_tables, (rope_cos, rope_sin), strict=False):
            self._place.write_rows(table, view.new_slots, values)
        step.run()
        return self._place.logits(self._logits)

    def cached_rows(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cached_rows(self._place, self.cache, layer, slots)

    def _table(self, view: CacheView) -> np.ndarray:
        """New slots and spans as int32 words in the form that the kernels read."""
        from edge.gpu_operations import attention_table

        for what, count, most in (
            ("stretches", len(view.spans), contract.MOST_SPANS),
            ("runs", len(view.run_cos), MOST_RUNS),
        ):
            if count > most:
                raise BackendError(
                    f"The window consists of {count} {what}, the TensorRT engine takes {most}",
                    hint="Use `--policy rebuild`, or a shorter window",
                )
        table = attention_table(
            view.new_slots,
            view.spans,
            capacity=self._capacity,
            run_count=len(view.run_cos),
            most_spans=contract.MOST_SPANS,
        )
        return np.asarray(table).view(np.int32)

    def _there(self, name: str, values: Any) -> DeviceArray:
        """An input's values on the device."""
        found = self._place.given(name, values)
        assert isinstance(found, DeviceArray), name  # the graphs read nothing in the host's memory
        return found

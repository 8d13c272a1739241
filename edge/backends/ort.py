"""A bundle's graphs on ONNX Runtime.

Owns the choice between native and stock graphs, and the KV cache's memory, which is bound to input and output alike so
that the attention operator updates it in place. How a session is made is `ort_session`'s.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge import contract, native
from edge.backends.base import CacheView
from edge.backends.cache_memory import Shape, allocate_arrays, array_bytes
from edge.backends.frame_tables import FrameTableCache
from edge.backends.ort_session import OrtSession
from edge.bundle import Bundle
from edge.contract import Component
from edge.errors import BackendError, MemoryBudgetError
from edge.memory import available_bytes


class OrtBackend:
    """Runs both graphs on ONNX Runtime's CPU provider: the native ones where they can be, else the stock ones.

    Args:
      bundle: an open bundle.
      threads: threads inside one operator; None leaves the choice to ONNX Runtime.

    Attributes:
      evicts_in_place: whether the decoder is the native graph.
      cache: the cache's memory by the graph input's name; empty before `allocate_cache`.
      notices: sentences for the user about what was chosen, empty where all is as it should be.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._manifest = bundle.manifest
        vision, decoder = bundle.manifest.vision, bundle.manifest.decoder
        self.notices = _notices(native.available(), vision, decoder)
        native_vision, native_decoder = uses_native_graph(vision), uses_native_graph(decoder)
        self._vision = _load(bundle, vision, native_vision, threads)
        self._decoder = _load(bundle, decoder, native_decoder, threads)
        self.evicts_in_place = native_decoder
        self._frames = FrameTableCache(bundle.manifest.vision_facts, bundle.manifest.preprocess, native=native_vision)
        self._logits = np.empty((1, bundle.manifest.decoder_facts.vocab_size), np.float32)
        self.cache: dict[str, np.ndarray] = {}
        self._slot_tables: list[np.ndarray] = []  # cosines and sines that each row was written with
        self._decoder.bind_output(contract.LOGITS, self._logits)

    def allocate_cache(self, capacity_tokens: int) -> None:
        shapes = self._cache_shapes(capacity_tokens)
        wanted_bytes = sum(map(array_bytes, shapes.values()))
        _check_memory(wanted_bytes, self._manifest.decoder_facts.layers, capacity_tokens)
        arrays = allocate_arrays(list(shapes.values()))
        self._slot_tables = []
        for name, array in zip(shapes, arrays, strict=True):
            self._decoder.bind(name, array)
            if name in (contract.SLOT_COS, contract.SLOT_SIN):
                self._slot_tables.append(array)
            else:
                self._decoder.bind_output(contract.updated(name), array)
        self.cache = dict(zip(shapes, arrays, strict=True))

    def _cache_shapes(self, capacity_tokens: int) -> dict[str, Shape]:
        """Shape and dtype of everything that grows with the capacity, by the graph input's name."""
        facts = self._manifest.decoder_facts
        rows = (1, facts.num_kv_heads, capacity_tokens)
        shapes: dict[str, Shape] = {}
        for layer in range(facts.layers):
            dtype = self._manifest.kv_dtypes[layer] if self.evicts_in_place else "float32"
            for name in (contract.key_cache_name(layer), contract.value_cache_name(layer)):
                shapes[name] = ((*rows, facts.head_dim), dtype)
            if dtype == "int8":
                for name in (contract.key_scales_name(layer), contract.value_scales_name(layer)):
                    shapes[name] = (rows, "float32")
        if contract.SLOT_COS in self._decoder.inputs:
            for name in (contract.SLOT_COS, contract.SLOT_SIN):
                shapes[name] = ((capacity_tokens, facts.head_dim // 2), "float32")
        return shapes

    def encode(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        tables = self._frames.of(rows, columns)
        feeds = {contract.PATCHES: tables.arranged(patches), **tables.feeds}
        return tables.restored(self._vision.run(contract.IMAGE_EMBEDS, feeds))

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView
    ) -> np.ndarray:
        given = {contract.INPUTS_EMBEDS: inputs_embeds, contract.ROPE_COS: rope_cos, contract.ROPE_SIN: rope_sin}
        if self.evicts_in_place:
            given[contract.NEW_SLOTS], given[contract.SPANS] = view.new_slots, view.spans
            given[contract.RUN_COS], given[contract.RUN_SIN] = view.run_cos, view.run_sin
        else:
            given[contract.CACHE_LENGTH] = np.array([_contiguous(view)], np.int32)
        kept = {name: np.ascontiguousarray(array) for name, array in given.items()}  # alive until the run is over
        for table, rows in zip(self._slot_tables, (rope_cos, rope_sin), strict=False):
            table[view.new_slots] = rows
        for name, array in kept.items():
            self._decoder.bind(name, array)
        self._decoder.run_bound()
        return self._logits[0]


def uses_native_graph(component: Component) -> bool:
    """Whether `OrtBackend` would run the native graph of this component: there is one, and the kernels are there."""
    return bool(component.native_file) and native.available() is None


def _load(bundle: Bundle, component: Component, use_native: bool, threads: int | None) -> OrtSession:
    path: Path = bundle.file(component.native_file if use_native else component.file)
    library = native.library_path() if use_native else None
    return OrtSession(path, component.weights, threads=threads, library=library)


def _notices(missing: str | None, vision: Component, decoder: Component) -> list[str]:
    """What the user should know about the choice of graphs."""
    if missing is not None:
        return [f"{missing}. Stock operators are used: they are slower, and the window cannot slide"]
    notices = []
    absent = [name for name, part in (("vision", vision), ("decoder", decoder)) if not part.native_file]
    if absent:
        notices.append(f"The bundle has no native graph of its {' and '.join(absent)}: stock operators are used there")
    if not decoder.native_file:
        notices[-1] += ", and the window cannot slide"
    if native.instruction_set() == "portable":
        notices.append("This CPU has no instruction set that the native kernels are written for: slow ones are used")
    return notices


def _contiguous(view: CacheView) -> int:
    length = view.contiguous_length()
    if length is None:
        raise BackendError(
            "The stock decoder graph appends to a cache that is filled from its first row, found a window with gaps",
            hint="Use `--policy rebuild`, or install the native kernels",
        )
    return length


def _check_memory(wanted_bytes: int, layers: int, capacity_tokens: int) -> None:
    free_bytes = available_bytes()
    if free_bytes is not None and wanted_bytes > free_bytes:  # before the kernel ends the process instead
        raise MemoryBudgetError(
            f"The KV cache needs {wanted_bytes / 2**20:.0f} MiB for {layers} layers x {capacity_tokens} "
            f"tokens, {free_bytes / 2**20:.0f} MiB is free",
            hint="Use a smaller window",
        )

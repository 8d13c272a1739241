"""A bundle's graphs on ONNX Runtime.

Owns the choice between native and stock graphs, and the KV cache's memory, which is bound to input and output alike so
that the attention operator updates it in place. `ort_session` makes sessions, `place` knows where arrays are.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge import contract, native
from edge.backends.base import CacheView
from edge.backends.cache_memory import Shape, array_bytes
from edge.backends.frame_tables import FrameTableCache
from edge.backends.kv_layout import SLOT_TABLES, cache_shapes, cached_rows
from edge.backends.ort_session import CPU, OrtSession, Provider, onnxruntime_module
from edge.backends.place import DevicePlace, HostPlace
from edge.bundle import Bundle
from edge.contract import Component
from edge.errors import BackendError, MemoryBudgetError
from edge.sampling import Logits


class OrtBackend:
    """Runs both graphs on one of ONNX Runtime's providers: the native ones where they can be, else the stock ones.

    Args:
      bundle: an open bundle.
      threads: threads inside one operator; None leaves the choice to ONNX Runtime.
      provider, place: where the graphs run and their arrays are; by default the CPU.
      decoder_provider: the decoder's, if it is another.

    Attributes:
      evicts_in_place: whether the decoder is the native graph.
      cache: the cache's memory by the graph input's name; empty before `allocate_cache`.
      notices: sentences for the user about what was chosen, empty where all is as it should be.
      identity: see `Backend`.
      placement: in words, where each component runs.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        provider: Provider = CPU,
        place: HostPlace | DevicePlace | None = None,
        decoder_provider: Provider | None = None,
    ) -> None:
        self._manifest = bundle.manifest
        self._place = place or HostPlace()
        vision, decoder = bundle.manifest.vision, bundle.manifest.decoder
        self.notices = _notices(native.available(), vision, decoder)
        native_vision, native_decoder = uses_native_graph(vision), uses_native_graph(decoder)
        self._vision = _load(bundle, vision, native_vision, threads, provider, self._place)
        self._decoder = _load(bundle, decoder, native_decoder, threads, decoder_provider or provider, self._place)
        for component, session in (("vision", self._vision), ("decoder", self._decoder)):
            if session.on_cpu:
                self.notices.append(f"Nodes of the {component} that run on the CPU: {', '.join(session.on_cpu)}")
        self.evicts_in_place = native_decoder
        self._frames = FrameTableCache(bundle.manifest.vision_facts, bundle.manifest.preprocess, native=native_vision)
        self._logits: Any = self._place.result(contract.LOGITS, (1, bundle.manifest.decoder_facts.vocab_size))
        self.cache: dict[str, Any] = {}
        self._slot_tables: list[Any] = []  # cosines and sines that each row was written with
        self._decoder.bind_output(contract.LOGITS, self._logits)
        self.identity = _identity(native_vision or native_decoder)
        self.placement = {
            name: f"{self._place.name or _cpu_name(is_native)}, {'native' if is_native else 'stock'} graph"
            for name, is_native in (("vision", native_vision), ("decoder", native_decoder))
        }

    def allocate_cache(self, capacity_tokens: int) -> None:
        self.cache, self._slot_tables = {}, []  # free what was there first
        shapes = self._cache_shapes(capacity_tokens)
        wanted_bytes = sum(map(array_bytes, shapes.values()))
        self._check_memory(wanted_bytes, capacity_tokens)
        self.cache = self._place.allocate(shapes)
        for name, array in self.cache.items():
            self._decoder.bind(name, array)
            if name in SLOT_TABLES:
                self._slot_tables.append(array)
            else:
                self._decoder.bind_output(contract.updated(name), array)

    def free_bytes(self) -> int | None:
        """Memory that is left where the cache is."""
        return self._place.free_bytes()

    def embeds_buffer(self, tokens: int) -> Any:
        """What a decoder gathers a run's embeddings in: takes and gives rows of (tokens, W) by slices."""
        return self._place.row_buffer(tokens, self._manifest.decoder_facts.hidden_size)

    def _cache_shapes(self, capacity_tokens: int) -> dict[str, Shape]:
        facts = self._manifest.decoder_facts
        dtypes = self._manifest.kv_dtypes if self.evicts_in_place else ["float32"] * facts.layers
        return cache_shapes(facts, dtypes, capacity_tokens, has_slot_tables=contract.SLOT_COS in self._decoder.inputs)

    def encode(self, patches: np.ndarray, rows: int, columns: int) -> Any:
        tables = self._frames.of(rows, columns)
        tokens = rows * columns // self._manifest.preprocess.merge_size**2
        found = self._place.result(contract.IMAGE_EMBEDS, (tokens, self._manifest.decoder_facts.hidden_size))
        self._vision.bind_output(contract.IMAGE_EMBEDS, found)
        self._run(self._vision, {contract.PATCHES: self._place.rows(patches, tables.patch_order), **tables.feeds})
        return self._place.rows(found, tables.token_places)

    def run_decoder(self, inputs_embeds: Any, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView) -> Logits:
        given = {contract.INPUTS_EMBEDS: inputs_embeds, contract.ROPE_COS: rope_cos, contract.ROPE_SIN: rope_sin}
        if self.evicts_in_place:
            given[contract.NEW_SLOTS], given[contract.SPANS] = view.new_slots, view.spans
            given[contract.RUN_COS], given[contract.RUN_SIN] = view.run_cos, view.run_sin
        else:
            given[contract.CACHE_LENGTH] = np.array([_contiguous(view)], np.int32)
        for table, rows in zip(self._slot_tables, (rope_cos, rope_sin), strict=False):
            self._place.write_rows(table, view.new_slots, rows)
        self._run(self._decoder, given)
        return self._place.logits(self._logits)

    def cached_rows(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cached_rows(self._place, self.cache, layer, slots)

    def _run(self, session: OrtSession, feeds: dict[str, Any]) -> None:
        given = {name: self._place.given(name, array) for name, array in feeds.items()}  # alive until the run is over
        for name, array in given.items():
            session.bind(name, array)
        session.run_bound(self._graph_of(session, given))

    def _graph_of(self, session: OrtSession, given: Mapping[str, Any]) -> int | None:
        """The number of the recorded graph that a run with these inputs repeats; None where none are recorded."""
        return None

    def _check_memory(self, wanted_bytes: int, capacity_tokens: int) -> None:
        free_bytes = self._place.free_bytes()
        if free_bytes is not None and wanted_bytes > free_bytes:  # before the kernel ends the process instead
            where = f" on {self._place.name}" if self._place.name else ""
            raise MemoryBudgetError(
                f"The KV cache needs {wanted_bytes / 2**20:.0f} MiB for {self._manifest.decoder_facts.layers} layers x "
                f"{capacity_tokens} tokens, {free_bytes / 2**20:.0f} MiB is free{where}",
                hint="Use a smaller window",
            )


def uses_native_graph(component: Component) -> bool:
    """Whether `OrtBackend` would run the native graph of this component: there is one, and the kernels are there."""
    return bool(component.native_file) and native.available() is None


def _load(
    bundle: Bundle,
    component: Component,
    use_native: bool,
    threads: int | None,
    provider: Provider,
    place: HostPlace | DevicePlace,
) -> OrtSession:
    path: Path = bundle.file(component.native_file if use_native else component.file)
    library = native.library_path() if use_native else None
    return OrtSession(path, component.weights, threads=threads, library=library, provider=provider, place=place)


def _identity(with_library: bool) -> dict[str, str]:
    """See `Backend.identity`: of a run on the CPU."""
    identity = {"onnxruntime": onnxruntime_module().__version__, "machine": platform.machine()}
    if with_library:
        digest = hashlib.sha256(native.library_path().read_bytes()).hexdigest()
        identity |= {"kernels": digest[:12], "instruction set": native.instruction_set()}
    return identity


def _cpu_name(with_library: bool) -> str:
    return f"CPU ({native.instruction_set()})" if with_library else "CPU"


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

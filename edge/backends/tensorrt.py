"""A bundle's graphs as TensorRT engines.

Owns the device memory that the engines' inputs and outputs are bound to; the KV cache is bound to input and output
alike, and the attention plugin updates it in place. Building and finding engines is `edge.engines`', memory and streams
are `edge.gpu`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge import contract
from edge.backends.base import CacheView
from edge.backends.frame_tables import FrameTableCache
from edge.backends.tensorrt_engine import Engine, Execution
from edge.bundle import Bundle
from edge.engines.profiles import MOST_CACHED_TOKENS, MOST_NEW_TOKENS, MOST_RUNS
from edge.engines.store import Listener
from edge.errors import BackendError, MemoryBudgetError
from edge.gpu import DeviceArray
from edge.memory import bytes_text


def say(text: str) -> None:
    """A line on stderr: a build takes minutes, and silence would look like a hang."""
    print(text, file=sys.stderr, flush=True)


class TensorRTBackend:
    """Runs both graphs as TensorRT engines, which are built first if there are none that fit.

    Args:
      bundle: an open bundle.
      listener: whom to tell of a build; None: stderr.
      engines: the folder of the engines; None: beside the bundle.

    Attributes:
      cache: the cache's memory by the graph input's name; empty before `allocate_cache`.

    Raises:
      EngineError: TensorRT, the plugin or an engine cannot be used. DeviceError: no GPU.
    """

    evicts_in_place = True

    def __init__(self, bundle: Bundle, *, listener: Listener | None = None, engines: Path | None = None) -> None:
        from edge.engines.here import open_store

        manifest = self._manifest = bundle.manifest
        self._gpu, store = open_store(bundle, folder=engines)
        told = listener or Listener(say=say)
        for component in ("vision", "decoder"):
            store.ensure(component, told)
        self._stream = self._gpu.make("stream")
        self._vision = Engine(store, "vision", self._gpu, self._stream)
        self._decoder = Engine(store, "decoder", self._gpu, self._stream)
        self._frame = self._vision.execution(0)
        self._steps = [self._decoder.execution(0), self._decoder.execution(1)]  # one token, many
        self.notices: list[str] = []
        self._frames = FrameTableCache(manifest.vision_facts, manifest.preprocess, native=False)
        self.cache: dict[str, DeviceArray] = {}
        self._slot_tables: list[DeviceArray] = []
        self._memory: dict[str, DeviceArray] = {}
        self._run_tables: np.ndarray | None = None
        self._allocate()

    def _allocate(self) -> None:
        """Memory for everything but the cache, as large as it gets."""
        facts, vision = self._manifest.decoder_facts, self._manifest.vision_facts
        half, merged = facts.head_dim // 2, self._manifest.preprocess.merge_size**2
        patches = self._manifest.max_visual_tokens * merged
        patch_values = 3 * self._manifest.preprocess.patch_size**2
        shapes: dict[str, tuple[int, ...]] = {
            contract.PATCHES: (patches, patch_values),
            contract.VISION_COS: (patches, vision.head_dim // 2),
            contract.VISION_SIN: (patches, vision.head_dim // 2),
            contract.WINDOW_MASK: (patches, patches),
            contract.IMAGE_EMBEDS: (patches // merged, vision.out_hidden_size),
            contract.INPUTS_EMBEDS: (MOST_NEW_TOKENS, facts.hidden_size),
            contract.ROPE_COS: (MOST_NEW_TOKENS, half),
            contract.ROPE_SIN: (MOST_NEW_TOKENS, half),
            contract.RUN_COS: (MOST_RUNS, half),
            contract.RUN_SIN: (MOST_RUNS, half),
            contract.LOGITS: (1, facts.vocab_size),
        }
        self._memory = {name: self._gpu.empty(shape) for name, shape in shapes.items()}
        for step in self._steps:
            step.bind_output(contract.LOGITS, self._memory[contract.LOGITS])

    def allocate_cache(self, capacity_tokens: int) -> None:
        if capacity_tokens > MOST_CACHED_TOKENS:
            raise MemoryBudgetError(
                f"The TensorRT engine takes a cache of at most {MOST_CACHED_TOKENS} tokens, {capacity_tokens} are "
                "needed",
                hint="Use a smaller window",
            )
        tensors = dict(self._cache_tensors(capacity_tokens))
        self.cache, self._slot_tables = {}, []  # free what was there first
        wanted = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in tensors.values())
        free = self._gpu.facts.free_bytes
        if wanted > free:
            layers = self._manifest.decoder_facts.layers
            raise MemoryBudgetError(
                f"The KV cache needs {bytes_text(wanted)} for {layers} layers x {capacity_tokens} tokens, "
                f"{bytes_text(free)} of GPU memory is free",
                hint="Use a smaller window",
            )
        self._memory[contract.ATTENTION_TABLE] = self._gpu.empty(self._most_table_bytes(capacity_tokens), np.uint8)
        for name, (shape, dtype) in tensors.items():
            array = self.cache[name] = self._gpu.empty(shape, dtype)
            self._gpu.call("fill", array.pointer, 0, array.nbytes, self._stream)
            for step in self._steps:
                step.bind_input(name, array)
                if name not in (contract.SLOT_COS, contract.SLOT_SIN):
                    step.bind_output(contract.updated(name), array)
        self._capacity = capacity_tokens
        self._slot_tables = [self.cache[n] for n in (contract.SLOT_COS, contract.SLOT_SIN) if n in self.cache]

    def _cache_tensors(self, capacity: int) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
        """Shape and dtype of everything that grows with the capacity, by the graph input's name."""
        facts = self._manifest.decoder_facts
        rows = (1, facts.num_kv_heads, capacity)
        for layer in range(facts.layers):
            int8 = self._manifest.kv_dtypes[layer] == "int8"
            values = ((*rows, facts.head_dim // 4), "int32") if int8 else ((*rows, facts.head_dim), "float32")
            yield contract.key_cache_name(layer), values
            yield contract.value_cache_name(layer), values
            if int8:
                yield contract.key_scales_name(layer), (rows, "float32")
                yield contract.value_scales_name(layer), (rows, "float32")
        if contract.SLOT_COS in self._decoder.inputs:
            for name in (contract.SLOT_COS, contract.SLOT_SIN):
                yield name, ((capacity, facts.head_dim // 2), "float32")

    def _most_table_bytes(self, capacity: int) -> int:
        from edge.engines.here import table_words

        return 4 * table_words(MOST_NEW_TOKENS, capacity, contract.MOST_SPANS)

    # -------------------------------------------------------------------------------------------------------- running

    def encode(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        tables = self._frames.of(rows, columns)
        for name, values in {contract.PATCHES: tables.arranged(patches), **tables.feeds}.items():
            self._send(self._frame, name, values)
        tokens = rows * columns // self._manifest.preprocess.merge_size**2
        embeds = self._memory[contract.IMAGE_EMBEDS]
        found = DeviceArray(embeds.pointer, (tokens, embeds.shape[1]), embeds.dtype, embeds.strides, embeds.owner)
        self._frame.bind_output(contract.IMAGE_EMBEDS, found)
        self._frame.run()
        return tables.restored(self._gpu.numpy(found, self._stream))

    def run_decoder(
        self, inputs_embeds: np.ndarray, rope_cos: np.ndarray, rope_sin: np.ndarray, view: CacheView
    ) -> np.ndarray:
        step = self._steps[0 if len(inputs_embeds) == 1 else 1]
        self._send(step, contract.INPUTS_EMBEDS, inputs_embeds)
        self._send(step, contract.ROPE_COS, rope_cos)
        self._send(step, contract.ROPE_SIN, rope_sin)
        self._send(step, contract.RUN_COS, view.run_cos)
        self._send(step, contract.RUN_SIN, view.run_sin)
        self._send(step, contract.ATTENTION_TABLE, self._table(view))
        for table, values in zip(self._slot_tables, (rope_cos, rope_sin), strict=False):
            self._scatter(table, view.new_slots, values)
        step.run()
        logits: np.ndarray = self._gpu.numpy(self._memory[contract.LOGITS], self._stream)
        return logits[0]

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

    def _send(self, execution: Execution, name: str, values: np.ndarray) -> None:
        """Copy an input's values to its memory, and tell the engine its shape."""
        memory = self._memory[name]
        target = DeviceArray(memory.pointer, values.shape, values.dtype, values.strides, memory.owner)
        if values.nbytes > memory.nbytes:
            raise BackendError(f"`{name}` takes at most {memory.shape}, found {values.shape}")
        self._gpu.write(target, values, self._stream)
        execution.bind_input(name, target)

    def _scatter(self, table: DeviceArray, slots: np.ndarray, values: np.ndarray) -> None:
        """Write row i of `values` to row `slots[i]`; rows that lie side by side in one copy."""
        row_bytes = table.strides[0]
        edges = np.flatnonzero(np.diff(slots) != 1) + 1
        for part in np.split(np.arange(len(slots)), edges):
            first = table.pointer + int(slots[part[0]]) * row_bytes
            rows = np.ascontiguousarray(values[part[0] : part[-1] + 1], np.float32)
            self._gpu.write(DeviceArray(first, rows.shape, rows.dtype, rows.strides, table.owner), rows, self._stream)

"""The exported graphs in ONNX Runtime, whole where they fit in memory, else a few layers at a time.

Owns sessions and slicing. A slice is built by the same builder over the same weight files as the whole graph, and is
removed afterwards. Does not judge results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge import contract
from edge.rope import decoder_rope
from export import decoder, vision
from export.config import ModelFacts
from export.graph_kinds import StockGraphs, Tables
from export.graph_session import AS_RUNTIME, GraphSession
from export.onnx_writer import GraphBuilder
from export.weight_store import StoredTensor

SLICE_FILE = "slice.onnx"
HEAD_PIECE_BYTES = 32 << 20
LOADED_FACTOR = {"float32": 3, "float16": 6, "int8": 3, "int4": 3}
"""Memory that a stored byte takes in a session at its peak: read, converted to float32, packed."""


@dataclass(frozen=True)
class Append:
    """New tokens of a conversation: embeddings (T, W) and m-RoPE positions (3, T)."""

    embeds: np.ndarray
    positions: np.ndarray


class GraphCheck:
    """Runs the graphs in `folder`.

    Args:
      budget_bytes: memory that weights may take; a graph that needs more is run in slices.
      accuracy_level: of products with quantised weights, see `graph_session`.
      kind: which graphs, and what they take.

    Attributes:
      watch: called with each layer's number, keys and values (Hkv, C, D) when a conversation of `decoder` is over.
    """

    def __init__(
        self,
        folder: Path,
        facts: ModelFacts,
        vision_weights: Mapping[str, StoredTensor],
        decoder_weights: Mapping[str, StoredTensor],
        budget_bytes: int,
        *,
        accuracy_level: str = AS_RUNTIME,
        kind: StockGraphs | None = None,
    ) -> None:
        self.folder = folder
        self.facts = facts
        self._vision_weights = vision_weights
        self._decoder_weights = decoder_weights
        self._budget_bytes = budget_bytes
        self._accuracy_level = accuracy_level
        self._kind = kind or StockGraphs()
        self.watch: Callable[[int, np.ndarray, np.ndarray], None] | None = None

    @property
    def slices(self) -> dict[str, int]:
        """In how many parts each graph is run; 1: the written file itself."""
        facts = self.facts
        return {
            "vision": len(self._slices(self._vision_weights, "blocks", facts.vision.depth)),
            "decoder": len(self._slices(self._decoder_weights, "layers", facts.decoder.layers)),
        }

    def embeddings(self, ids: np.ndarray) -> np.ndarray:
        """Rows (T, W) float32 of the bundle's embedding table."""
        table, scale = self._table("embedding"), self._decoder_weights.get("embedding.scale")
        rows = np.asarray(table[ids], np.float32)
        if scale is None:
            return rows
        scales = self._table("embedding.scale")[ids]
        return np.asarray((rows.reshape(*scales.shape, -1) * scales[..., None]).reshape(rows.shape))

    def _table(self, name: str) -> np.ndarray:
        stored = self._decoder_weights[name]
        return np.memmap(self.folder / stored.file, np.dtype(stored.dtype), "r", stored.offset, stored.shape)

    def vision(self, frames: list[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
        """Embeddings (N, W) of frames given as (patches, rows, columns)."""
        tables = [self._kind.frame(self.facts, rows, columns) for _, rows, columns in frames]
        slices = self._slices(self._vision_weights, "blocks", self.facts.vision.depth)
        values = [size.arranged(patches) for (patches, _, _), size in zip(frames, tables, strict=True)]
        for blocks in slices:
            session, whole = None, len(slices) == 1  # free the slice before this one first
            builder = vision.build_vision(self.facts, self._vision_weights, blocks, operators=self._kind.operators)
            session = self._session(self._kind.vision_file if whole else self._write(builder))
            first = contract.PATCHES if blocks.start == 0 else vision.HIDDEN
            values = [session.run({first: v, **size.feeds})[0] for v, size in zip(values, tables, strict=True)]
        return [size.restored(v) for v, size in zip(values, tables, strict=True)]

    def decoder(self, appends: list[Append]) -> np.ndarray:
        """Logits (n, V) after each of `n` appends, with a cache that grows."""
        return self.decoders([(appends, range(len(appends)))])[0]

    def decoders(self, conversations: Sequence[tuple[list[Append], Sequence[int]]]) -> list[np.ndarray]:
        """The same of several conversations, each with a cache of its own; of each, only the appends that are named."""
        facts, weights = self.facts.decoder, self._decoder_weights
        rope = decoder_rope(facts)
        tables = [[rope.tables(append.positions) for append in appends] for appends, _ in conversations]
        slices = self._slices(weights, "layers", facts.layers)
        values = [[append.embeds for append in appends] for appends, _ in conversations]
        whole = len(slices) == 1
        for layers in slices:
            session = None  # free the slice before this one first
            session = self._session(self._kind.decoder_file if whole else self._write_slice(layers))
            first = contract.INPUTS_EMBEDS if layers.start == 0 else decoder.HIDDEN
            for i, (_, read) in enumerate(conversations):
                values[i] = self._run_appends(session, first, layers, values[i], tables[i])
                if layers.stop == facts.layers:
                    values[i] = [values[i][part] for part in read]
        if not whole:
            session = None
            logits = iter(self._head([value for own in values for value in own]))
            values = [[next(logits) for _ in own] for own in values]
        return [np.concatenate(own) for own in values]

    def layer(self, layer: int, conversations: Sequence[list[Append]]) -> list[list[np.ndarray]]:
        """What one layer makes of appends whose `embeds` are what goes into it, with a cache for each conversation.

        Returns:
          Hidden states (T, W) of each append; (1, W), the last token's, of the last layer.
        """
        facts = self.facts.decoder
        rope, run = decoder_rope(facts), range(layer, layer + 1)
        session = self._session(self._write_slice(run))
        first = contract.INPUTS_EMBEDS if layer == 0 else decoder.HIDDEN
        return [
            self._run_appends(
                session, first, run, [a.embeds for a in appends], [rope.tables(a.positions) for a in appends]
            )
            for appends in conversations
        ]

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits (n, V) of the last layer's hidden states (n, W)."""
        return np.concatenate(self._head([row[None] for row in hidden]))

    def _write_slice(self, layers: range) -> str:
        operators = self._kind.operators
        builder = decoder.build_decoder(
            self.facts.decoder, self._decoder_weights, layers, head=False, operators=operators
        )
        return self._write(builder, attention=True)

    def _run_appends(
        self,
        session: GraphSession,
        first: str,
        layers: range,
        values: list[np.ndarray],
        tables: list[Tables],
    ) -> list[np.ndarray]:
        caches = self._kind.caches(self.facts.decoder, layers, sum(len(cos) for cos, _ in tables))
        results = []
        for i, value in enumerate(values):
            result, *updated = session.run({first: value, **self._kind.append(tables, i), **caches})
            caches = dict(zip(caches, updated, strict=True))
            results.append(result)
        if self.watch is not None:
            for layer in layers:
                last = [caches[name(layer)][0] for name in (contract.key_cache_name, contract.value_cache_name)]
                self.watch(layer, *last)
        return results

    def _head(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Logits of last hidden states, over a part of the vocabulary at a time where the head's layout allows it."""
        facts, weights = self.facts.decoder, self._decoder_weights
        head = weights["head.weight"]
        step = facts.vocab_size
        if "head.scale" not in weights:
            step = max(1, HEAD_PIECE_BYTES * facts.vocab_size // head.length)
        pieces: list[list[np.ndarray]] = [[] for _ in values]
        for first in range(0, facts.vocab_size, step):
            part = dict(weights)
            if step < facts.vocab_size:
                part["head.weight"] = head.rows(first, min(first + step, facts.vocab_size))
            session = None  # free the piece before this one first
            session = self._session(self._write(decoder.build_head(facts, part, operators=self._kind.operators)))
            for i, value in enumerate(values):
                pieces[i].append(session.run({decoder.HIDDEN: value})[0])
        return [np.concatenate(parts, axis=1) for parts in pieces]

    def _slices(self, weights: Mapping[str, StoredTensor], group: str, count: int) -> list[range]:
        """Runs of layers whose weights stay within the budget; one run if the whole graph does."""
        names = (name for name in weights if not name.startswith("embedding"))  # its rows are looked up in the file
        cost = {name: weights[name].length * LOADED_FACTOR[weights[name].dtype] for name in names}
        if sum(cost.values()) <= self._budget_bytes:
            return [range(count)]
        layers = [0] * count
        for name, bytes_ in cost.items():
            parts = name.split(".")
            if parts[0] == group:
                layers[int(parts[1])] += bytes_
        slices, start, total = [], 0, 0
        for layer, bytes_ in enumerate(layers):
            if layer > start and total + bytes_ > self._budget_bytes:
                slices.append(range(start, layer))
                start, total = layer, 0
            total += bytes_
        return [*slices, range(start, count)]

    def _write(self, builder: GraphBuilder, *, attention: bool = False) -> str:
        make = self._kind.operators(builder)
        functions = make.functions(self.facts.decoder) if attention else []
        (self.folder / SLICE_FILE).write_bytes(builder.serialize("slice", "slice", functions))
        return SLICE_FILE

    def _session(self, file: str) -> GraphSession:
        session = GraphSession(self.folder / file, self._accuracy_level, self._kind.library)
        if file == SLICE_FILE:
            (self.folder / file).unlink()
        return session

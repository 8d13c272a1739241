"""What the parity check feeds to each kind of graph, stock and native.

Owns the graphs' inputs for a conversation that only grows. Does not run anything.
"""

from __future__ import annotations

import numpy as np

from edge import contract
from edge.contract import DecoderFacts
from edge.rope import FrameTables, frame_tables, window_ordered_tables
from export.config import ModelFacts
from export.native import NativeOperators
from export.onnx_writer import GraphBuilder
from export.stock import Operators, StockOperators

Feeds = dict[str, np.ndarray]
Tables = tuple[np.ndarray, np.ndarray]


class StockGraphs:
    """Graphs of standard operators."""

    vision_file = contract.VISION_FILE
    decoder_file = contract.DECODER_FILE
    operators: Operators = StockOperators
    library: str | None = None

    def frame(self, facts: ModelFacts, rows: int, columns: int) -> FrameTables:
        """What the vision graph takes beside patches, and the order of the patches."""
        return frame_tables(rows, columns, facts.vision, merge=facts.merge_size, patch_size=facts.patch_size)

    def caches(self, facts: DecoderFacts, layers: range, capacity: int) -> Feeds:
        """Empty caches of some layers, in the order of the graph's outputs."""
        tensors = self.operators(GraphBuilder({})).cache_tensors(facts, layers)
        sizes = {name: [capacity if isinstance(n, str) else n for n in shape] for name, _, shape in tensors}
        return {name: np.zeros(sizes[name], dtype) for name, dtype, _ in tensors}

    def append(self, tables: list[Tables], index: int) -> Feeds:
        """What the decoder takes beside tokens and caches in append `index`; `tables` are those of all appends."""
        cos, sin = tables[index]
        cached = sum(len(earlier) for earlier, _ in tables[:index])
        return {contract.ROPE_COS: cos, contract.ROPE_SIN: sin, contract.CACHE_LENGTH: np.array([cached], np.int32)}


class NativeGraphs(StockGraphs):
    """Graphs with the operators of our library. Each append becomes a span of its own.

    Args:
      library: the file to register.
      kv_dtypes: of each layer's cache.
    """

    vision_file = contract.NATIVE_VISION_FILE
    decoder_file = contract.NATIVE_DECODER_FILE

    def __init__(self, library: str, kv_dtypes: tuple[str, ...]) -> None:
        self.library = library
        self.operators = NativeOperators.of(kv_dtypes)

    def frame(self, facts: ModelFacts, rows: int, columns: int) -> FrameTables:
        return window_ordered_tables(rows, columns, facts.vision, merge=facts.merge_size, patch_size=facts.patch_size)

    def append(self, tables: list[Tables], index: int) -> Feeds:
        cos, sin = tables[index]
        ends = np.cumsum([len(table) for table, _ in tables])
        spans = [(end - len(table), len(table), 0) for end, (table, _) in zip(ends[:index], tables, strict=False)]
        slot_tables = [np.zeros((ends[-1], cos.shape[1]), np.float32) for _ in range(2)]
        for whole, parts in zip(slot_tables, zip(*tables[: index + 1], strict=True), strict=True):
            whole[: ends[index]] = np.concatenate(parts)
        return {
            contract.ROPE_COS: cos,
            contract.ROPE_SIN: sin,
            contract.NEW_SLOTS: np.arange(ends[index] - len(cos), ends[index], dtype=np.int32),
            contract.SPANS: np.array(spans, np.int32).reshape(-1, 3),
            contract.RUN_COS: np.ones((1, cos.shape[1]), np.float32),
            contract.RUN_SIN: np.zeros((1, cos.shape[1]), np.float32),
            contract.SLOT_COS: slot_tables[0],
            contract.SLOT_SIN: slot_tables[1],
        }

"""Is a written graph the graph that the config describes? Read back from its file, node by node.

Owns what can be told without running anything: the epsilon of every norm, heads and scale of every attention, which
weights each layer uses, and where in which file each of them lies. Numbers hide such faults: a wrong epsilon changes
nothing where activations are large, and a 4-bit model is far from the original even when it is right. Judges no
weight's values (see `weight_audit`) and no result (see `parity`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edge import contract
from export.onnx_writer import ELEMENT_TYPES
from export.vision import EPSILON as VISION_EPSILON
from export.weight_store import StoredTensor

NATIVE_NORM = "SimplifiedLayerNormalization"
ATTENTIONS = (
    contract.STREAM_ATTENTION,
    contract.SPAN_ATTENTION,
    contract.SPAN_ATTENTION_INT8,
    contract.TABLE_ATTENTION,
)
WORD_BYTES = {ELEMENT_TYPES["uint8"]: 1, ELEMENT_TYPES["int32"]: 4}
"""Of a weight that its operator unpacks itself."""
LAYER = re.compile(r"(?:layers|blocks)\.\d+\b")


def decoder_problems(path: Path, facts: contract.DecoderFacts, stored: Mapping[str, StoredTensor]) -> list[str]:
    """What is wrong with a decoder graph; empty where nothing is.

    Args:
      facts: what the checkpoint's config says.
      stored: the weights that were written, by name.
    """
    graph = _Graph(path)
    found = [*graph.norm_problems(2 * facts.layers + 1, facts.rms_norm_eps), *graph.weight_problems(stored)]
    found += graph.order_problems("layers", facts.layers)
    nodes = [node for node in graph.nodes if node.op_type in ATTENTIONS]
    if len(nodes) != facts.layers:
        found.append(f"`{graph.name}` has {len(nodes)} attention nodes, expected {facts.layers}")
    wanted = {"num_heads": facts.num_heads, "num_kv_heads": facts.num_kv_heads, "scale": facts.head_dim**-0.5}
    for layer, node in enumerate(nodes):
        found += graph.attribute_problems(node, wanted)
        cache = contract.key_cache_name(layer)
        if cache not in node.input:
            found.append(f"`{graph.name}` node `{node.name}` should take `{cache}`, it takes {list(node.input[4:6])}")
    return found


def vision_problems(path: Path, facts: contract.VisionFacts, stored: Mapping[str, StoredTensor]) -> list[str]:
    """The same for a vision graph."""
    graph = _Graph(path)
    found = [*graph.norm_problems(2 * facts.depth + 1, VISION_EPSILON), *graph.weight_problems(stored)]
    found += graph.order_problems("blocks", facts.depth)
    for node in graph.nodes:
        if node.op_type == contract.WINDOW_ATTENTION:
            found += graph.attribute_problems(node, {"num_heads": facts.num_heads, "scale": facts.head_dim**-0.5})
    return found


class _Graph:
    """One model file, without its weights."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        graph = onnx.load(path, load_external_data=False).graph
        self.nodes = list(graph.node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {output: node for node in self.nodes for output in node.output}

    def norm_problems(self, count: int, epsilon: float) -> Iterator[str]:
        """Norms that are missing, and those with another epsilon than the config's."""
        found = dict(self._epsilons())
        if len(found) != count:
            yield f"`{self.name}` has {len(found)} norms, expected {count}"
        for name, value in found.items():
            if np.float32(value) != np.float32(epsilon):
                yield f"`{self.name}` norm `{name}` has epsilon {value:.3g}, the config says {epsilon:.3g}"

    def _epsilons(self) -> Iterator[tuple[str, float]]:
        for node in self.nodes:
            if node.op_type == NATIVE_NORM:
                yield node.input[1], _attributes(node).get("epsilon", 1e-5)
            if node.op_type == "Sqrt":
                addition = self._producers[node.input[0]]
                values = [self._scalar(name) for name in addition.input]
                yield node.name, next(value for value in values if value is not None)

    def _scalar(self, name: str) -> float | None:
        tensor = self._initializers.get(name)
        return None if tensor is None else float(numpy_helper.to_array(tensor).reshape(-1)[0])

    def attribute_problems(self, node: onnx.NodeProto, wanted: Mapping[str, float]) -> Iterator[str]:
        """Attributes that differ from what the config says."""
        found = _attributes(node)
        for name, value in wanted.items():
            if np.float32(found.get(name, np.nan)) != np.float32(value):
                yield f"`{self.name}` node `{node.name}` has {name} {found.get(name)}, the config says {value:.6g}"

    def weight_problems(self, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
        """Weights that are not read from where they were written."""
        for name, tensor in self._initializers.items():
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            found = (place.get("location"), int(place.get("offset", 0)), int(place.get("length", 0)))
            entry = stored.get(name)
            if entry is None:
                yield f"`{self.name}` uses a weight `{name}` that was not written"
            elif found != (entry.file, entry.offset, entry.length):
                yield f"`{self.name}` reads `{name}` from {found}, it was written to {_place(entry)}"
            elif tensor.data_type in WORD_BYTES:
                if [n * WORD_BYTES[tensor.data_type] for n in tensor.dims] != [entry.length]:
                    yield f"`{self.name}` reads `{name}` as {list(tensor.dims)} words, it has {entry.length} bytes"
            elif (tensor.data_type, tuple(tensor.dims)) != (ELEMENT_TYPES[entry.dtype], entry.shape):
                yield f"`{self.name}` reads `{name}` as {list(tensor.dims)}, it was written as {list(entry.shape)}"

    def order_problems(self, group: str, count: int) -> Iterator[str]:
        """Layers that use another layer's weights."""
        seen = set()
        for node in self.nodes:
            layer = LAYER.match(node.name) or LAYER.match(node.output[0])
            if layer is None:
                continue
            seen.add(layer[0])
            for name in node.input:
                own = LAYER.match(name)
                if name in self._initializers and own is not None and own[0] != layer[0]:
                    yield f"`{self.name}` node `{node.name}` uses `{name}`, a weight of another layer"
        missing = [f"{group}.{i}" for i in range(count) if f"{group}.{i}" not in seen]
        if missing:
            yield f"`{self.name}` has no nodes of {', '.join(missing)}"


def _place(stored: StoredTensor) -> tuple[str, int, int]:
    return stored.file, stored.offset, stored.length


def _attributes(node: onnx.NodeProto) -> dict[str, float]:
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}

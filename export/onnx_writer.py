"""A small builder of ONNX graphs: nodes, inline constants, and weights that stay in external files.

Owns naming and serialisation; the same calls give the same bytes. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge.contract import OPSET, TensorFacts
from export.weight_store import StoredTensor

IR_VERSION = 10
"""The first with int4 tensors; ONNX Runtime 1.20 reads it."""
CONTRIB_DOMAIN = "com.microsoft"
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


class GraphBuilder:
    """One graph under construction. Values are referred to by their names.

    Args:
      stored: the weights that `weight` may refer to; each appears in the model only if it is used.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self.inputs: list[TensorFacts] = []
        self.outputs: list[TensorFacts] = []
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._names: dict[str, int] = {}
        self._scope = ""

    def scope(self, name: str) -> None:
        """Name the nodes that follow `name/...`."""
        self._scope = f"{name}/" if name else ""

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings in `shape` are symbolic sizes."""
        self.inputs.append(TensorFacts(name, dtype, tuple(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output; a node must have produced the value `name`."""
        self.outputs.append(TensorFacts(name, dtype, tuple(shape)))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] | int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node; `outputs` gives their names, or their number. Returns the outputs' names."""
        count = self._names.get(self._scope + op, 0)
        self._names[self._scope + op] = count + 1
        name = self._scope + op + (f"_{count}" if count else "")
        if isinstance(outputs, int):
            outputs = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return list(outputs)

    def op(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns its name."""
        return self.node(op, inputs, outputs=[output] if output else 1, **attributes)[0]

    def constant(self, values: Any, dtype: str) -> str:
        """A small constant, kept in the graph itself; equal ones are shared."""
        array = np.asarray(values, dtype)
        text = "x".join(str(v) for v in array.reshape(-1).tolist())
        name = f"constant.{dtype}.{'scalar' if array.ndim == 0 else array.ndim}.{text}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        """A weight in an external file."""
        return self._external(name, self.stored[name].dtype, self.stored[name].shape)

    def weight_bytes_of(self, name: str) -> str:
        """A weight in an external file as one vector of its bytes, for operators that unpack it themselves."""
        return self._external(name, "uint8", (self.stored[name].length,))

    def weight_words_of(self, name: str) -> str:
        """The same as a vector of int32 words, for TensorRT, which keeps bytes to itself."""
        return self._external(name, "int32", (self.stored[name].length // 4,))

    def _external(self, name: str, dtype: str, shape: tuple[int, ...]) -> str:
        if name not in self._initializers:
            stored = self.stored[name]
            tensor = TensorProto(name=name, data_type=ELEMENT_TYPES[dtype], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", stored.file), ("offset", stored.offset), ("length", stored.length)):
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def weight_bytes(self) -> int:
        """Bytes of the weights in use."""
        return sum(self.stored[name].length for name in self._initializers if name in self.stored)

    def serialize(self, name: str, producer: str, functions: Sequence[onnx.FunctionProto] = ()) -> bytes:
        """The finished model file, to be put beside the external files it refers to."""
        domains = {"": OPSET}
        for node in self._nodes:
            domains.setdefault(node.domain, 1)
        for function in functions:
            for imported in function.opset_import:
                domains.setdefault(imported.domain, imported.version)
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(facts) for facts in self.inputs],
            [_value_info(facts) for facts in self.outputs],
            list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            functions=list(functions),
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in sorted(domains.items())],
            ir_version=IR_VERSION,
            producer_name=producer,
        )
        return model.SerializeToString(deterministic=True)


def _value_info(facts: TensorFacts) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(facts.name, ELEMENT_TYPES[facts.dtype], list(facts.shape))

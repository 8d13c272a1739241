"""`streamo::StreamAttention` as a function of stock ONNX Runtime operators, carried by the model file itself.

Owns the function's body. A runtime with a native kernel of the same name replaces the node; any other inlines this.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from edge.contract import CUSTOM_DOMAIN, OPSET, STREAM_ATTENTION, DecoderFacts
from export.onnx_writer import CONTRIB_DOMAIN

INPUTS = ["qkv", "qkv_bias", "rope_cos", "rope_sin", "key_cache", "value_cache", "cache_length"]
OUTPUTS = ["attention", "key_cache_updated", "value_cache_updated"]
ATTRIBUTES = ["num_heads", "num_kv_heads", "scale"]


def stream_attention_function(facts: DecoderFacts) -> onnx.FunctionProto:
    """The op's definition for one model. Shapes and meaning of its inputs: `edge.contract.STREAM_ATTENTION`.

    The rotary tables hold one row per new token, so row numbers 0..T-1 stand in for positions. GroupQueryAttention
    writes behind the cached tokens and, given the same memory for past and present, writes in place.
    """
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    attention = helper.make_node(
        "GroupQueryAttention",
        ["rotated_queries", "rotated_keys", "values", "key_cache", "value_cache", "last_slot", "total_length"],
        ["batched_attention", "key_cache_updated", "value_cache_updated"],
        domain=CONTRIB_DOMAIN,
        do_rotary=0,
    )
    for name, source, kind in (
        ("num_heads", "num_heads", AttributeProto.INT),
        ("kv_num_heads", "num_kv_heads", AttributeProto.INT),
        ("scale", "scale", AttributeProto.FLOAT),
    ):
        attention.attribute.append(AttributeProto(name=name, ref_attr_name=source, type=kind))
    rotary = ["first", "rope_cos", "rope_sin"]
    nodes = [
        _constant("first", np.array([0], np.int64)),
        _constant("one", np.array([1], np.int32)),
        _constant("widths", np.array([queries, keys, keys], np.int64)),
        helper.make_node("Add", ["qkv", "qkv_bias"], ["biased"]),
        helper.make_node("Unsqueeze", ["biased", "first"], ["batched"]),
        helper.make_node("Split", ["batched", "widths"], ["queries", "keys", "values"], axis=2),
        helper.make_node("RotaryEmbedding", ["queries", *rotary], ["rotated_queries"], domain=CONTRIB_DOMAIN),
        helper.make_node("RotaryEmbedding", ["keys", *rotary], ["rotated_keys"], domain=CONTRIB_DOMAIN),
        helper.make_node("Shape", ["qkv"], ["new_tokens_int64"], start=0, end=1),
        helper.make_node("Cast", ["new_tokens_int64"], ["new_tokens"], to=TensorProto.INT32),
        helper.make_node("Add", ["cache_length", "new_tokens"], ["total_length"]),
        helper.make_node("Sub", ["total_length", "one"], ["last_slot"]),
        attention,
        helper.make_node("Squeeze", ["batched_attention", "first"], ["attention"]),
    ]
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB_DOMAIN, 1)]
    return helper.make_function(CUSTOM_DOMAIN, STREAM_ATTENTION, INPUTS, OUTPUTS, nodes, imports, ATTRIBUTES)


def _constant(name: str, values: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))

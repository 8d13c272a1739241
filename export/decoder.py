"""The decoder graph: new tokens in, the KV cache grown, logits of the last token out.

Owns the graph's layout and the names of its weights. Names, shapes and dtypes of inputs and outputs: `edge.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge import contract
from edge.contract import DecoderFacts
from export.layers import dense, gated_mlp, linear, rms_norm
from export.onnx_writer import GraphBuilder
from export.weight_store import StoredTensor

LAST = 2**31 - 1
HIDDEN = "hidden"
"""Between slices of a model that is checked a few layers at a time: (T, W) float32, the layers' residual stream."""


def build_decoder(
    facts: DecoderFacts, stored: Mapping[str, StoredTensor], layers: range | None = None, *, head: bool = True
) -> GraphBuilder:
    """Build the decoder, or only some of its layers.

    Args:
      layers: a run of layers. A slice that starts later takes `hidden` of the slice before it; one that ends earlier
        gives `hidden`, (1, W) after the last layer. None: the whole decoder.
      head: whether the last layer is followed by norm and head.
    """
    layers = range(facts.layers) if layers is None else layers
    builder = GraphBuilder(stored)
    rows = ("T", facts.head_dim // 2)
    first = contract.INPUTS_EMBEDS if layers.start == 0 else HIDDEN
    hidden = builder.input(first, "float32", ("T", facts.hidden_size))
    builder.input(contract.ROPE_COS, "float32", rows)
    builder.input(contract.ROPE_SIN, "float32", rows)
    builder.input(contract.CACHE_LENGTH, "int32", (1,))
    cache_shape = (1, facts.num_kv_heads, "C", facts.head_dim)
    caches = [name for i in layers for name in (contract.key_cache_name(i), contract.value_cache_name(i))]
    for name in caches:
        builder.input(name, "float32", cache_shape)
    ends = head and layers.stop == facts.layers
    if any(name.endswith(".scale") for name in stored):
        # ONNX Runtime merges MatMul and residual Add into Gemm where their shapes are known to agree, and then no
        # longer sees a quantised MatMul. Behind this reshape, which copies nothing, the number of rows is unnamed.
        builder.scope("rows")
        hidden = builder.op("Reshape", hidden, builder.constant([-1, facts.hidden_size], "int64"))
    for layer in layers:
        last = layer == facts.layers - 1
        output = HIDDEN + ".updated" if not ends and layer == layers.stop - 1 else None
        hidden = _layer(builder, facts, layer, hidden, last_token_only=last, output=output)
    if ends:
        _head(builder, facts, hidden)
    else:
        rows_out = 1 if layers.stop == facts.layers else "T"
        builder.output(hidden, "float32", (rows_out, facts.hidden_size))
    for name in caches:
        builder.output(contract.updated(name), "float32", cache_shape)
    return builder


def _layer(
    builder: GraphBuilder, facts: DecoderFacts, layer: int, hidden: str, *, last_token_only: bool, output: str | None
) -> str:
    prefix = f"layers.{layer}"
    builder.scope(f"{prefix}/attention")
    normed = rms_norm(builder, hidden, f"{prefix}.input_norm", facts.rms_norm_eps)
    qkv = linear(builder, normed, f"{prefix}.qkv")
    key_cache, value_cache = contract.key_cache_name(layer), contract.value_cache_name(layer)
    attention = builder.node(
        contract.STREAM_ATTENTION,
        [qkv, dense(builder, f"{prefix}.qkv.bias"), contract.ROPE_COS, contract.ROPE_SIN, key_cache, value_cache,
         contract.CACHE_LENGTH],
        outputs=[f"{prefix}/attention", contract.updated(key_cache), contract.updated(value_cache)],
        domain=contract.CUSTOM_DOMAIN,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        scale=facts.head_dim**-0.5,
    )[0]  # fmt: skip
    if last_token_only:  # the last layer's other tokens have left their keys and values; nothing reads their sums
        attention, hidden = _last_row(builder, attention), _last_row(builder, hidden)
    hidden = builder.op("Add", hidden, linear(builder, attention, f"{prefix}.attention_output"))
    builder.scope(f"{prefix}/mlp")
    normed = rms_norm(builder, hidden, f"{prefix}.post_norm", facts.rms_norm_eps)
    mlp = gated_mlp(builder, normed, prefix, facts.intermediate_size)
    return builder.op("Add", hidden, mlp, output=output)


def _last_row(builder: GraphBuilder, values: str) -> str:
    end = builder.constant([LAST], "int64")
    return builder.op("Slice", values, builder.constant([-1], "int64"), end, builder.constant([0], "int64"))


def build_head(facts: DecoderFacts, stored: Mapping[str, StoredTensor]) -> GraphBuilder:
    """Norm and head alone: `hidden` (1, W) in, logits of the words that "head.weight" in `stored` has rows for."""
    builder = GraphBuilder(stored)
    _head(builder, facts, builder.input(HIDDEN, "float32", (1, facts.hidden_size)))
    return builder


def _head(builder: GraphBuilder, facts: DecoderFacts, hidden: str) -> None:
    """Unquantised, the head keeps the embedding table's layout (V, W), and a tied one shares its bytes."""
    builder.scope("head")
    normed = rms_norm(builder, hidden, "final_norm", facts.rms_norm_eps)
    if "head.scale" in builder.stored:
        words = builder.stored["head.weight"].shape[1]
        linear(builder, normed, "head", output=contract.LOGITS)
    else:
        words = builder.stored["head.weight"].shape[0]
        builder.op("Gemm", normed, dense(builder, "head.weight"), transB=1, output=contract.LOGITS)
    builder.output(contract.LOGITS, "float32", (1, words))

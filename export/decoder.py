"""The decoder graph: new tokens in, the KV cache grown, logits of the last token out.

Owns the graph's layout and the names of its weights. Names, shapes and dtypes of inputs and outputs: `edge.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge import contract
from edge.contract import DecoderFacts
from export.onnx_writer import GraphBuilder
from export.stock import Operators, StockOperators
from export.weight_store import StoredTensor

LAST = 2**31 - 1
HIDDEN = "hidden"
"""Between slices of a model that is checked a few layers at a time: (T, W) float32, the layers' residual stream."""


def build_decoder(
    facts: DecoderFacts,
    stored: Mapping[str, StoredTensor],
    layers: range | None = None,
    *,
    head: bool = True,
    operators: Operators = StockOperators,
) -> GraphBuilder:
    """Build the decoder, or only some of its layers.

    Args:
      layers: a run of layers. A slice that starts later takes `hidden` of the slice before it; one that ends earlier
        gives `hidden`, (1, W) after the last layer. None: the whole decoder.
      head: whether the last layer is followed by norm and head.
      operators: what the layers are made of.
    """
    layers = range(facts.layers) if layers is None else layers
    builder = GraphBuilder(stored)
    make = operators(builder)
    rows = ("T", facts.head_dim // 2)
    first = contract.INPUTS_EMBEDS if layers.start == 0 else HIDDEN
    hidden = builder.input(first, "float32", ("T", facts.hidden_size))
    builder.input(contract.ROPE_COS, "float32", rows)
    builder.input(contract.ROPE_SIN, "float32", rows)
    make.cache_inputs(facts, layers)
    ends = head and layers.stop == facts.layers
    hidden = make.start(hidden, facts.hidden_size)
    for layer in layers:
        last = layer == facts.layers - 1
        output = HIDDEN + ".updated" if not ends and layer == layers.stop - 1 else None
        hidden = _layer(make, facts, layer, hidden, last_token_only=last, output=output)
    if ends:
        _head(make, facts, hidden)
    else:
        rows_out = 1 if layers.stop == facts.layers else "T"
        builder.output(hidden, "float32", (rows_out, facts.hidden_size))
    make.cache_outputs(facts, layers)
    return builder


def _layer(
    make: StockOperators, facts: DecoderFacts, layer: int, hidden: str, *, last_token_only: bool, output: str | None
) -> str:
    prefix, builder = f"layers.{layer}", make.builder
    builder.scope(f"{prefix}/attention")
    normed = make.rms_norm(hidden, f"{prefix}.input_norm", facts.rms_norm_eps)
    attention = make.attention(facts, layer, make.linear(normed, f"{prefix}.qkv"))
    if last_token_only:  # the last layer's other tokens have left their keys and values; nothing reads their sums
        attention, hidden = _last_row(builder, attention), _last_row(builder, hidden)
    hidden = make.linear(attention, f"{prefix}.attention_output", residual=hidden)
    builder.scope(f"{prefix}/mlp")
    normed = make.rms_norm(hidden, f"{prefix}.post_norm", facts.rms_norm_eps)
    return make.gated_mlp(normed, prefix, residual=hidden, output=output)


def _last_row(builder: GraphBuilder, values: str) -> str:
    end = builder.constant([LAST], "int64")
    return builder.op("Slice", values, builder.constant([-1], "int64"), end, builder.constant([0], "int64"))


def build_head(
    facts: DecoderFacts, stored: Mapping[str, StoredTensor], *, operators: Operators = StockOperators
) -> GraphBuilder:
    """Norm and head alone: `hidden` (1, W) in, logits of the words that "head.weight" in `stored` has rows for."""
    builder = GraphBuilder(stored)
    _head(operators(builder), facts, builder.input(HIDDEN, "float32", (1, facts.hidden_size)))
    return builder


def _head(make: StockOperators, facts: DecoderFacts, hidden: str) -> None:
    builder = make.builder
    builder.scope("head")
    normed = make.rms_norm(hidden, "final_norm", facts.rms_norm_eps)
    if make.is_quantized("head"):
        words = builder.stored["head.weight"].shape[1]
        make.linear(normed, "head", output=contract.LOGITS)
    else:
        words = builder.stored["head.weight"].shape[0]
        make.tied_head(normed, output=contract.LOGITS)
    builder.output(contract.LOGITS, "float32", (1, words))

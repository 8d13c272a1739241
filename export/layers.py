"""The few layers that both graphs are made of: linear maps in any precision, RMS norm, gated MLP.

Owns how a weight's stored precision becomes nodes. Knows no model's layout.
"""

from __future__ import annotations

from export.onnx_writer import GraphBuilder


def dense(builder: GraphBuilder, name: str) -> str:
    """A weight's values as float32."""
    weight = builder.weight(name)
    return weight if builder.stored[name].dtype == "float32" else builder.op("Cast", weight, to=1)


def linear(builder: GraphBuilder, values: str, name: str, *, bias: bool = False, output: str | None = None) -> str:
    """`values` (T, K) times the weight stored as `name`.weight (K, N), plus `name`.bias (N) if asked for.

    A quantised weight has its scales (K / block, N) beside it as `name`.scale.
    """
    weight = f"{name}.weight"
    scale = f"{name}.scale"
    if scale in builder.stored:
        block = builder.stored[weight].shape[0] // builder.stored[scale].shape[0]
        inputs = (builder.weight(weight), builder.weight(scale))
        matrix = builder.op("DequantizeLinear", *inputs, axis=0, block_size=block)
    else:
        matrix = dense(builder, weight)
    if not bias:
        return builder.op("MatMul", values, matrix, output=output)
    return builder.op("Add", builder.op("MatMul", values, matrix), dense(builder, f"{name}.bias"), output=output)


def rms_norm(builder: GraphBuilder, values: str, name: str, epsilon: float) -> str:
    """Root-mean-square norm over the last axis, in float32, times the weight `name`."""
    square = builder.op("Pow", values, builder.constant(2.0, "float32"))
    mean = builder.op("ReduceMean", square, builder.constant([-1], "int64"), keepdims=1)
    deviation = builder.op("Sqrt", builder.op("Add", mean, builder.constant(epsilon, "float32")))
    return builder.op("Mul", builder.op("Div", values, deviation), dense(builder, name))


def gated_mlp(builder: GraphBuilder, values: str, prefix: str, intermediate_size: int, *, bias: bool = False) -> str:
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are one weight, gate first."""
    both = linear(builder, values, f"{prefix}.gate_up", bias=bias)
    widths = builder.constant([intermediate_size, intermediate_size], "int64")
    gate, up = builder.node("Split", [both, widths], outputs=2, axis=1)
    silu = builder.op("Mul", gate, builder.op("Sigmoid", gate))
    return linear(builder, builder.op("Mul", silu, up), f"{prefix}.down", bias=bias)

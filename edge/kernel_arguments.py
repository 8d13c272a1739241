"""Arrays to the structs of the native kernels, with the checks that C cannot make.

Owns dtype, shape and contiguity of every argument of `native`. What a slot, span or size may be is the kernels' to say.

Each function returns the struct, the output it points to if it has one, and every array that must outlive the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge import kernels_abi as abi
from edge.errors import KernelError

OPTIONAL_ARRAYS = ("qkv_bias", "key_scales", "value_scales", "key_offset", "slot_cos", "slot_sin")
"""Of attention; None where they are left out."""


def attention_arguments(given: Mapping[str, Any]) -> tuple[abi.AttentionArguments, np.ndarray, list[np.ndarray]]:
    """`given`: the arguments of `native.attention` by name."""
    keys, query_heads = given["key_cache"], given["query_heads"]
    if not isinstance(keys, np.ndarray) or keys.ndim not in (3, 4) or (keys.ndim == 4 and keys.shape[0] != 1):
        raise KernelError(f"key_cache: expected shape (Hkv, C, D) or (1, Hkv, C, D), found {_shape(keys)}")
    if keys.dtype not in (np.float32, np.int8):
        raise KernelError(f"key_cache: expected float32 or int8, found {keys.dtype}")
    if query_heads < 1:
        raise KernelError(f"query_heads: expected at least 1, found {query_heads}")
    kv_heads, capacity, head_dim = keys.shape[-3:]
    tokens = len(_checked(given["new_slots"], "new_slots", np.int32, (None,)))
    width, half = (query_heads + 2 * kv_heads) * head_dim, head_dim // 2
    single = (1,) * (keys.ndim - 3)
    scales = (*single, kv_heads, capacity) if np.ndim(given["key_scales"]) == keys.ndim - 1 else (kv_heads, capacity)
    runs = len(_checked(given["run_cos"], "run_cos", np.float32, (None, half)))
    shapes: dict[str, tuple[Any, tuple[int | None, ...]]] = {
        "qkv": (np.float32, (tokens, width)),
        "qkv_bias": (np.float32, (width,)),
        "rope_cos": (np.float32, (tokens, half)),
        "rope_sin": (np.float32, (tokens, half)),
        "key_cache": (keys.dtype, (*single, kv_heads, capacity, head_dim)),
        "value_cache": (keys.dtype, (*single, kv_heads, capacity, head_dim)),
        "key_scales": (np.float32, scales),
        "value_scales": (np.float32, scales),
        "key_offset": (np.float32, (kv_heads, head_dim)),
        "slot_cos": (np.float32, (capacity, half)),
        "slot_sin": (np.float32, (capacity, half)),
        "new_slots": (np.int32, (tokens,)),
        "spans": (np.int32, (None, 3)),
        "run_cos": (np.float32, (runs, half)),
        "run_sin": (np.float32, (runs, half)),
    }
    written = ("key_cache", "value_cache", "key_scales", "value_scales")
    output = np.empty((tokens, query_heads * head_dim), np.float32)
    arguments = abi.AttentionArguments(
        query_heads, kv_heads, head_dim, capacity, tokens, abi.KV_INT8 if keys.dtype == np.int8 else abi.KV_F32
    )
    arguments.scale = head_dim**-0.5 if given["scale"] is None else given["scale"]
    kept = [output]
    for name, (dtype, shape) in shapes.items():
        if given[name] is None and name in OPTIONAL_ARRAYS:
            continue
        array = _checked(given[name], name, dtype, shape, writable=name in written)
        kept.append(array)
        setattr(arguments, name, array.ctypes.data)
    arguments.span_count, arguments.run_count = len(given["spans"]), runs
    arguments.output = output.ctypes.data
    return arguments, output, kept


def window_arguments(
    qkv: np.ndarray,
    rope_cos: np.ndarray,
    rope_sin: np.ndarray,
    window_starts: np.ndarray,
    heads: int,
    scale: float | None,
) -> tuple[abi.WindowAttentionArguments, np.ndarray, list[np.ndarray]]:
    qkv = _checked(qkv, "qkv", np.float32, (None, None))
    rows, width = qkv.shape
    if heads < 1 or width % (3 * heads):
        raise KernelError(f"qkv: expected a width of 3 heads D with {heads} heads, found {width}")
    head_dim = width // (3 * heads)
    cos = _checked(rope_cos, "rope_cos", np.float32, (rows, head_dim // 2))
    sin = _checked(rope_sin, "rope_sin", np.float32, (rows, head_dim // 2))
    starts = _checked(window_starts, "window_starts", np.int32, (None,))
    if not len(starts):
        raise KernelError("window_starts: expected at least 1 number, found none")
    output = np.empty((rows, heads * head_dim), np.float32)
    arguments = abi.WindowAttentionArguments(
        heads, head_dim, rows, len(starts) - 1, head_dim**-0.5 if scale is None else scale
    )
    for name, array in (("qkv", qkv), ("rope_cos", cos), ("rope_sin", sin), ("window_starts", starts)):
        setattr(arguments, name, array.ctypes.data)
    arguments.output = output.ctypes.data
    return arguments, output, [qkv, cos, sin, starts, output]


def weights_source(
    codes: np.ndarray, scales: np.ndarray, bits: int, block: int, gated: bool
) -> tuple[abi.WeightsSource, list[np.ndarray]]:
    scales = _checked(scales, "scales", np.float32, (None, None))
    outputs = scales.shape[1]
    if not isinstance(codes, np.ndarray) or codes.dtype not in (np.int8, np.uint8):
        raise KernelError(f"codes: expected int8 or uint8, found {getattr(codes, 'dtype', type(codes).__name__)}")
    codes = _checked(codes, "codes", codes.dtype, (None,) * codes.ndim)
    # K follows from the codes, since the last block may be short.
    inputs, rest = divmod(codes.nbytes * 8, max(1, outputs * bits))
    blocks = -(-inputs // max(1, block))
    if rest or blocks != len(scales):
        raise KernelError(
            f"codes: expected {bits} bits for each of {outputs} outputs and of the inputs of {len(scales)} blocks of "
            f"{block}, found {codes.nbytes} bytes"
        )
    source = abi.WeightsSource(inputs, outputs, bits, block, int(gated), codes.ctypes.data, scales.ctypes.data)
    return source, [codes, scales]


def matmul_arguments(
    input: np.ndarray,
    shape: tuple[int, int, bool],
    bias: np.ndarray | None,
    residual: np.ndarray | None,
    output: np.ndarray | None,
) -> tuple[abi.MatmulArguments, np.ndarray, list[np.ndarray]]:
    inputs, outputs, gated = shape
    input = _rows_checked(input, "input", (None, inputs))
    rows, width = len(input), outputs // 2 if gated else outputs
    if output is None:
        output = np.empty((rows, width), np.float32)
    output = _rows_checked(output, "output", (rows, width), writable=True)
    kept = [input, output]
    arguments = abi.MatmulArguments(rows=rows, input=input.ctypes.data, output=output.ctypes.data)
    arguments.input_stride = _row_stride(input)
    arguments.output_stride = _row_stride(output)
    if bias is not None:
        kept.append(_checked(bias, "bias", np.float32, (outputs,)))
        arguments.bias = kept[-1].ctypes.data
    if residual is not None:
        kept.append(_rows_checked(residual, "residual", (rows, width)))
        if _row_stride(residual) != arguments.output_stride:
            raise KernelError(
                f"residual: expected rows {arguments.output_stride} numbers apart, as in the output, "
                f"found {_row_stride(residual)}"
            )
        arguments.residual = kept[-1].ctypes.data
    return arguments, output, kept


def _checked(array: Any, name: str, dtype: Any, shape: tuple[int | None, ...], *, writable: bool = False) -> np.ndarray:
    """`array`, if it is what C expects; None in `shape` stands for any size."""
    _check_form(array, name, dtype, shape, writable)
    if not array.flags.c_contiguous:
        raise KernelError(f"{name}: expected a contiguous array, found strides {array.strides}")
    return array


def _rows_checked(array: Any, name: str, shape: tuple[int | None, ...], *, writable: bool = False) -> np.ndarray:
    """As `_checked` for float32 rows that may lie apart."""
    _check_form(array, name, np.float32, shape, writable)
    row, column = array.strides
    if (array.shape[1] > 1 and column != 4) or (len(array) > 1 and (row % 4 or row < 4 * array.shape[1])):
        raise KernelError(f"{name}: expected contiguous rows, one behind the other, found strides {array.strides}")
    return array


def _check_form(array: Any, name: str, dtype: Any, shape: tuple[int | None, ...], writable: bool) -> None:
    if not isinstance(array, np.ndarray):
        raise KernelError(f"{name}: expected an array, found {type(array).__name__}")
    if array.dtype != dtype:
        raise KernelError(f"{name}: expected {np.dtype(dtype)}, found {array.dtype}")
    if array.ndim != len(shape) or any(
        e is not None and e != found for e, found in zip(shape, array.shape, strict=True)
    ):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise KernelError(f"{name}: expected shape {wanted}, found {array.shape}")
    if writable and not array.flags.writeable:
        raise KernelError(f"{name}: expected memory that can be written, found a read-only array")


def _row_stride(array: np.ndarray) -> int:
    return array.strides[0] // 4 if len(array) > 1 else array.shape[1]


def _shape(array: Any) -> object:
    return array.shape if isinstance(array, np.ndarray) else type(array).__name__

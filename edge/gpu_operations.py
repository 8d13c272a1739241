"""The GPU kernels' operations on device arrays: for tests, benchmarks and callers without a graph.

Owns the way from arrays to the C structs, with the same checks as `native`: `kernel_arguments` looks only at an array's
form, so device memory is shown to it as numpy arrays that nobody reads. What each operation computes is said in
`kernels/include/streamo_gpu.h`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edge import gpu_abi as abi
from edge.errors import KernelError
from edge.gpu import Gpu
from edge.gpu_arrays import DeviceArray, device_array, device_pointer
from edge.kernel_arguments import (
    OPTIONAL_ARRAYS,
    attention_arguments,
    matmul_arguments,
    weights_source,
    window_arguments,
)

ON_HOST = ("new_slots", "spans")


def form_of(value: Any, name: str) -> np.ndarray:
    """A numpy array with the address, shape, type and strides of a device array. Its elements must not be touched."""
    array = device_array(value, name)
    if not array.pointer:
        raise KernelError(f"{name}: expected device memory, found a null pointer")
    last = sum((size - 1) * step for size, step in zip(array.shape, array.strides, strict=True) if size)
    memory: Any = (ctypes.c_byte * (last + array.dtype.itemsize)).from_address(array.pointer)
    return np.ndarray(array.shape, array.dtype, memory, strides=array.strides)


def attention(
    gpu: Gpu,
    *,
    query_heads: int,
    scale: float | None = None,
    table: DeviceArray | None = None,
    most_spans: int | None = None,
    output: DeviceArray | None = None,
    stream: int | None = None,
    **arrays: Any,
) -> DeviceArray:
    """`native.attention` on the device; `arrays` are its arrays by name, `spans` and `new_slots` numpy's.

    Args:
      table: what `attention_table` made, on the device; None sends spans and slots with this call.
      most_spans: as the table was made for. output: (T, Hq D) float32; None makes a new array.
    """
    given: dict[str, Any] = dict.fromkeys(OPTIONAL_ARRAYS)
    for name, value in arrays.items():
        given[name] = value if value is None or name in ON_HOST else form_of(value, name)
    arguments, host_output, kept = attention_arguments({**given, "query_heads": query_heads, "scale": scale})
    found = _output(gpu, output, host_output.shape)
    arguments.output = found.pointer
    most = arguments.span_count if most_spans is None else most_spans
    _run(gpu, "attention", arguments, more=(device_pointer(table), most), stream=stream)
    del kept
    return found


def attention_table(new_slots: np.ndarray, spans: np.ndarray, *, capacity: int, run_count: int, most_spans: int) -> Any:
    """Slots and spans in the form the kernels read: a numpy array of bytes to be copied to the device.

    Args:
      new_slots: (T,) int32. spans: (S, 3) int32, S at most `most_spans`. capacity: C.
    """
    library = abi.load_library()
    need = ctypes.c_size_t()
    abi.accept(library.streamo_gpu_attention_table_bytes(len(new_slots), capacity, most_spans, ctypes.byref(need)))
    found = np.zeros(need.value, np.uint8)
    arguments = abi.kernels_abi.AttentionArguments(new_tokens=len(new_slots), capacity=capacity, run_count=run_count)
    slots, rows = np.ascontiguousarray(new_slots, np.int32), np.ascontiguousarray(spans, np.int32)
    arguments.new_slots, arguments.spans, arguments.span_count = slots.ctypes.data, rows.ctypes.data, len(rows)
    abi.accept(
        library.streamo_gpu_attention_table(ctypes.byref(arguments), most_spans, found.ctypes.data, found.nbytes)
    )
    return found


def window_attention(
    gpu: Gpu,
    qkv: Any,
    rope_cos: Any,
    rope_sin: Any,
    window_starts: np.ndarray,
    *,
    heads: int,
    scale: float | None = None,
    device_starts: Any = None,
    output: DeviceArray | None = None,
    stream: int | None = None,
) -> DeviceArray:
    """`native.window_attention` on the device. `window_starts` is numpy's; `device_starts` the same on the device."""
    cos, sin = form_of(rope_cos, "rope_cos"), form_of(rope_sin, "rope_sin")
    arguments, host_output, _kept = window_arguments(form_of(qkv, "qkv"), cos, sin, window_starts, heads, scale)
    found = _output(gpu, output, host_output.shape)
    arguments.output = found.pointer
    _run(gpu, "window_attention", arguments, more=(device_pointer(device_starts, "device_starts"),), stream=stream)
    return found


def matmul(
    gpu: Gpu,
    input: Any,
    codes: Any,
    scales: Any,
    *,
    bits: int,
    block: int,
    gated: bool = False,
    bias: Any = None,
    residual: Any = None,
    output: DeviceArray | None = None,
    activations: int = abi.ACTIVATIONS_AUTO,
    stream: int | None = None,
) -> DeviceArray:
    """`native.Weights(...).run(input, ...)` on the device, from codes and scales as the bundle stores them."""
    source, _weights = weights_source(form_of(codes, "codes"), form_of(scales, "scales"), bits, block, gated)
    rows = form_of(input, "input")
    found = _output(gpu, output, (len(rows), source.outputs // 2 if gated else source.outputs))
    shape = (int(source.inputs), int(source.outputs), gated)
    added = None if bias is None else form_of(bias, "bias"), None if residual is None else form_of(residual, "residual")
    arguments, _, _kept = matmul_arguments(rows, shape, added[0], added[1], form_of(found, "output"))
    _run(gpu, "matmul", source, arguments, activations, stream=stream)
    return found


def rms_norm(
    gpu: Gpu,
    input: Any,
    weight: Any,
    *,
    epsilon: float,
    residual: Any = None,
    sum: Any = None,
    output: DeviceArray | None = None,
    stream: int | None = None,
) -> DeviceArray:
    """x / sqrt(mean(x^2) + epsilon) * weight with x = input + residual, which is written to `sum` if given."""
    form = form_of(input, "input")
    found = _output(gpu, output, form.shape)
    arguments = abi.NormArguments(rows=form.shape[0], width=form.shape[1], epsilon=epsilon, output=found.pointer)
    for name, value in (("input", input), ("residual", residual), ("weight", weight), ("sum", sum)):
        setattr(arguments, name, device_pointer(value, name))
    gpu.call("norm_run", ctypes.byref(arguments), stream)
    return found


def sample(
    gpu: Gpu,
    logits: Any,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    random: float = 0.0,
    token: DeviceArray | None = None,
    stream: int | None = None,
) -> DeviceArray:
    """The next token's id, (1,) int32 on the device, from (V,) float32 logits; `edge.sampling` says how.

    Args:
      random: from 0 to below 1; with the number of a `Sampler`'s own generator the token is the `Sampler`'s.
    """
    array = device_array(logits, "logits")
    found = token if token is not None else gpu.empty(1, np.int32)
    arguments = abi.SampleArguments(int(np.prod(array.shape)), temperature, top_k, top_p, random)
    arguments.logits, arguments.token = device_pointer(array, "logits"), found.pointer
    _run(gpu, "sample", arguments, stream=stream)
    return found


def patches_of_frame(
    gpu: Gpu,
    plane: Any,
    chroma: Any = None,
    *,
    new_size: tuple[int, int],
    patch: int,
    merge: int,
    mean: tuple[float, float, float],
    deviation: tuple[float, float, float],
    full_range: bool = False,
    bt709: bool = False,
    output: DeviceArray | None = None,
    stream: int | None = None,
) -> DeviceArray:
    """A frame on the device to the vision tower's input: resize, normalise, patchify.

    Args:
      plane: RGB (H, W, 3) uint8, or with `chroma` the luma plane (H, W) of an NV12 frame. chroma: (H / 2, W / 2, 2).
      new_size: (height, width) after the resize, see `preprocess.smart_resize`. mean, deviation: of pixels from 0 to 1.

    Returns:
      (patches, 3 * patch**2) float32, as `preprocess.patchify`.
    """
    image = form_of(plane, "plane")
    found = _output(gpu, output, (new_size[0] // patch * (new_size[1] // patch), 3 * patch * patch))
    arguments = abi.FrameArguments(
        pixels=abi.PIXELS_RGB if chroma is None else abi.PIXELS_NV12,
        full_range=full_range,
        bt709=bt709,
        height=image.shape[0],
        width=image.shape[1],
        plane_stride=image.strides[0],
        plane=image.ctypes.data,
        new_height=new_size[0],
        new_width=new_size[1],
        patch=patch,
        merge=merge,
        mean=mean,
        deviation=deviation,
        output=found.pointer,
    )
    height, width = image.shape[:2]
    _check_plane(image, "plane", (height, width, 3) if chroma is None else (height, width))
    if chroma is not None:
        half = form_of(chroma, "chroma")
        _check_plane(half, "chroma", (height // 2, width // 2, 2))
        arguments.chroma, arguments.chroma_stride = half.ctypes.data, half.strides[0]
    _run(gpu, "frame", arguments, stream=stream)
    return found


def _check_plane(plane: np.ndarray, name: str, shape: tuple[int, ...]) -> None:
    packed = plane.strides[1:] == ((shape[2], 1) if len(shape) == 3 else (1,))
    if plane.dtype != np.uint8 or plane.shape != shape or not packed:
        found = f"{plane.dtype} {plane.shape} with strides {plane.strides}"
        raise KernelError(f"{name}: expected uint8 {shape} with rows in one piece, found {found}")


def _output(gpu: Gpu, given: DeviceArray | None, shape: tuple[int, ...]) -> DeviceArray:
    if given is None:
        return gpu.empty(shape)
    if given.shape != shape or given.dtype != np.float32:
        raise KernelError(f"output: expected float32 {shape}, found {given.dtype} {given.shape}")
    return given


def _run(gpu: Gpu, operation: str, *arguments: Any, more: tuple[Any, ...] = (), stream: int | None) -> None:
    """Ask how much workspace an operation takes, and run it with as much.

    Args:
      arguments: structs and numbers that both calls take. more: what only the second takes behind them.
    """
    given = [ctypes.byref(value) if isinstance(value, ctypes.Structure) else value for value in arguments]
    need = ctypes.c_size_t()
    gpu.call(f"{operation}_workspace", *given, ctypes.byref(need))
    space = gpu.workspace(need.value, stream) if need.value else None
    memory, size = (space.pointer, space.nbytes) if space else (None, 0)
    gpu.call(f"{operation}_run", *given, *more, memory, size, stream)

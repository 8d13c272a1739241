"""The native kernels, called with numpy arrays: for tests, benchmarks and backends that have no graph.

Owns the calls and the lifetime of what they make; arrays are checked in `kernel_arguments`. What each function computes
is said in `kernels/include/streamo_kernels.h`. Letters as there: T new tokens, C rows of the cache, Hq and Hkv heads,
D head width, R runs, K and N inputs and outputs of a product.

Every function raises KernelError where arguments do not fit, and BackendError where the library is absent.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import numpy as np

from edge import kernels_abi as abi
from edge.errors import BackendError, KernelError
from edge.kernel_arguments import attention_arguments, matmul_arguments, weights_source, window_arguments
from edge.kernels_abi import library_path

__all__ = [
    "Threads",
    "Weights",
    "accept",
    "attention",
    "attention_reference",
    "available",
    "instruction_set",
    "instruction_set_available",
    "library_path",
    "matmul_reference",
    "select_instruction_set",
    "window_attention",
    "window_attention_reference",
]


def available() -> str | None:
    """None if the kernels can be used; else one sentence that says why not."""
    try:
        abi.load_library()
    except BackendError as error:
        return error.message
    return None


def instruction_set() -> str:
    """The one in use: "avx512vnni", "avx2", "i8mm", "dotprod" or "portable"."""
    return abi.load_library().streamo_instruction_set().decode()


def instruction_set_available(name: str) -> bool:
    """Whether this build on this CPU can use the instruction set called `name`."""
    return bool(abi.load_library().streamo_instruction_set_available(name.encode()))


def select_instruction_set(name: str | None) -> None:
    """Use another instruction set from now on; None returns to the best. Weights keep the layout they were packed in.

    Raises:
      KernelError: there is none of that name, or this CPU does not have it.
    """
    library = abi.load_library()
    accept(library.streamo_select_instruction_set(None if name is None else name.encode()))


class Threads:
    """Threads of our own, for calls outside ONNX Runtime. Close them, or use them in a `with` statement.

    Args:
      count: how many work at once, the calling thread included.
    """

    def __init__(self, count: int) -> None:
        self._pointer: int | None = None
        if count < 1:
            raise KernelError(f"Threads: expected at least 1, found {count}")
        self._library = abi.load_library()
        self._pointer = self._library.streamo_threads_create(count)
        if not self._pointer:
            raise KernelError(f"Threads: {_refusal() or f'{count} of them cannot be started'}")
        self.count = count

    @property
    def pointer(self) -> int:
        """For functions of the library; KernelError if the threads were closed."""
        if not self._pointer:
            raise KernelError("Threads: they were closed")
        return self._pointer

    def close(self) -> None:
        """End the threads. Not while another call uses them."""
        if self._pointer:
            self._library.streamo_threads_destroy(self._pointer)
            self._pointer = None

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def attention(
    qkv: np.ndarray,
    rope_cos: np.ndarray,
    rope_sin: np.ndarray,
    key_cache: np.ndarray,
    value_cache: np.ndarray,
    new_slots: np.ndarray,
    spans: np.ndarray,
    run_cos: np.ndarray,
    run_sin: np.ndarray,
    *,
    query_heads: int,
    scale: float | None = None,
    qkv_bias: np.ndarray | None = None,
    key_scales: np.ndarray | None = None,
    value_scales: np.ndarray | None = None,
    key_offset: np.ndarray | None = None,
    slot_cos: np.ndarray | None = None,
    slot_sin: np.ndarray | None = None,
    threads: Threads | None = None,
) -> np.ndarray:
    """Append T tokens to the caches, which are changed in place, and attend over them.

    Args:
      qkv: (T, (Hq + 2 Hkv) D) float32. rope_cos, rope_sin: (T, D / 2) float32.
      key_cache, value_cache: (Hkv, C, D) or (1, Hkv, C, D), float32 or int8.
      new_slots: (T,) int32. spans: (S, 3) int32: slot, length, run. run_cos, run_sin: (R, D / 2) float32.
      query_heads: Hq. scale: of the scores; None is D ** -0.5.
      qkv_bias: ((Hq + 2 Hkv) D,) float32.
      key_scales, value_scales: (Hkv, C) or (1, Hkv, C) float32; with int8 caches, changed in place.
      key_offset: (Hkv, D) float32. slot_cos, slot_sin: (C, D / 2) float32, with key_offset.

    Returns:
      (T, Hq D) float32.
    """
    given = {name: value for name, value in locals().items() if name != "threads"}
    arguments, output, _kept = attention_arguments(given)
    accept(abi.load_library().streamo_attention_run(ctypes.byref(arguments), _threads_pointer(threads)))
    return output


def attention_reference(*arrays: np.ndarray, **named: Any) -> np.ndarray:
    """The oracle of `attention`: the same arguments, in plain loops and double precision, without threads."""
    given = inspect.signature(attention).bind(*arrays, **named)
    given.apply_defaults()
    arguments, output, _kept = attention_arguments(given.arguments)
    accept(abi.load_library().streamo_attention_reference(ctypes.byref(arguments)))
    return output


def window_attention(
    qkv: np.ndarray,
    rope_cos: np.ndarray,
    rope_sin: np.ndarray,
    window_starts: np.ndarray,
    *,
    heads: int,
    scale: float | None = None,
    threads: Threads | None = None,
) -> np.ndarray:
    """Attention inside consecutive windows of rows.

    Args:
      qkv: (P, 3 heads D) float32. rope_cos, rope_sin: (P, D / 2) float32.
      window_starts: (windows + 1,) int32, rising from 0 to P. scale: None is D ** -0.5.

    Returns:
      (P, heads D) float32.
    """
    arguments, output, _kept = window_arguments(qkv, rope_cos, rope_sin, window_starts, heads, scale)
    accept(abi.load_library().streamo_window_attention_run(ctypes.byref(arguments), _threads_pointer(threads)))
    return output


def window_attention_reference(
    qkv: np.ndarray,
    rope_cos: np.ndarray,
    rope_sin: np.ndarray,
    window_starts: np.ndarray,
    *,
    heads: int,
    scale: float | None = None,
) -> np.ndarray:
    """The oracle of `window_attention`."""
    arguments, output, _kept = window_arguments(qkv, rope_cos, rope_sin, window_starts, heads, scale)
    accept(abi.load_library().streamo_window_attention_reference(ctypes.byref(arguments)))
    return output


class Weights:
    """Quantised weights, packed once for the instruction set in use. Close them, or use a `with` statement.

    Args:
      codes: 8 bits: (K, N) int8. 4 bits: (K, N / 2) uint8, two codes a byte, the first in the low half. A flat vector
        of the same bytes is taken too.
      scales: (K / block, N) float32. Both arrays may be freed afterwards.
      gated: the first half of the N columns is the gate, the rest is up; products are silu(gate) * up.
    """

    def __init__(
        self,
        codes: np.ndarray,
        scales: np.ndarray,
        *,
        bits: int,
        block: int,
        gated: bool = False,
        threads: Threads | None = None,
    ) -> None:
        self._pointer = ctypes.c_void_p()
        source, _kept = weights_source(codes, scales, bits, block, gated)
        self._library = abi.load_library()
        self.inputs, self.outputs, self.gated = int(source.inputs), int(source.outputs), gated
        accept(
            self._library.streamo_weights_pack(
                ctypes.byref(source), _threads_pointer(threads), ctypes.byref(self._pointer)
            )
        )

    @property
    def pointer(self) -> ctypes.c_void_p:
        """For functions of the library; KernelError if the weights were closed."""
        if not self._pointer:
            raise KernelError("Weights: they were closed")
        return self._pointer

    @property
    def bytes(self) -> int:
        """Memory that the packed weights take."""
        return int(self._library.streamo_weights_bytes(self.pointer))

    def run(
        self,
        input: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        residual: np.ndarray | None = None,
        output: np.ndarray | None = None,
        threads: Threads | None = None,
    ) -> np.ndarray:
        """activation(input . weights + bias) + residual.

        Args:
          input: (T, K) float32; rows may lie apart. bias: (N,) float32.
          residual: (T, width) float32, width N, or N / 2 if gated; may be `output` itself.
          output: where to write, (T, width) float32, rows may lie apart; None makes a new array.

        Returns:
          `output`.
        """
        pointer = self.pointer
        shape = (self.inputs, self.outputs, self.gated)
        arguments, result, _kept = matmul_arguments(input, shape, bias, residual, output)
        accept(self._library.streamo_matmul_run(pointer, ctypes.byref(arguments), _threads_pointer(threads)))
        return result

    def close(self) -> None:
        """Free the packed weights."""
        if self._pointer:
            self._library.streamo_weights_destroy(self._pointer)
            self._pointer = ctypes.c_void_p()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def matmul_reference(
    input: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    *,
    bits: int,
    block: int,
    gated: bool = False,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """The oracle of `Weights.run`: double precision, the input not quantised. Arguments as there."""
    source, _kept_source = weights_source(codes, scales, bits, block, gated)
    shape = (int(source.inputs), int(source.outputs), gated)
    arguments, output, _kept = matmul_arguments(input, shape, bias, residual, None)
    accept(abi.load_library().streamo_matmul_reference(ctypes.byref(source), ctypes.byref(arguments)))
    return output


def _threads_pointer(threads: Threads | None) -> int | None:
    return None if threads is None else threads.pointer


def accept(status: int) -> None:
    """Raise KernelError where a function of the library returned anything but 0."""
    if status:
        raise KernelError(_refusal() or f"The native kernel failed with status {status}")


def _refusal() -> str:
    return abi.last_error(abi.load_library())

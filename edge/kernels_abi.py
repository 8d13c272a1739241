"""The native kernels' C interface, seen through ctypes: its structs, its functions, and where the library is.

Owns what `kernels/include/streamo_kernels.h` says, once more in ctypes, and the loading of the library that the install
built. Knows no array: shapes are checked in `native`.

Environment:
  STREAMO_EDGE_KERNELS: another file to load as the library; `off` runs without it.
  STREAMO_EDGE_INSTRUCTION_SET: which kernels to use instead of the best for this CPU, e.g. `portable`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from edge.errors import BackendError

ABI_VERSION = 1
LIBRARY_FILE = "libstreamo_kernels.so"
LIBRARY_VARIABLE = "STREAMO_EDGE_KERNELS"
INSTRUCTION_SET_VARIABLE = "STREAMO_EDGE_INSTRUCTION_SET"
OFF = "off"

KV_F32, KV_INT8 = 0, 1


class AttentionArguments(ctypes.Structure):
    """`streamo_attention`."""

    _fields_ = [
        ("query_heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("new_tokens", ctypes.c_int32),
        ("kv_type", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("qkv", ctypes.c_void_p),
        ("qkv_bias", ctypes.c_void_p),
        ("rope_cos", ctypes.c_void_p),
        ("rope_sin", ctypes.c_void_p),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("key_offset", ctypes.c_void_p),
        ("slot_cos", ctypes.c_void_p),
        ("slot_sin", ctypes.c_void_p),
        ("new_slots", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("span_count", ctypes.c_int32),
        ("run_cos", ctypes.c_void_p),
        ("run_sin", ctypes.c_void_p),
        ("run_count", ctypes.c_int32),
        ("output", ctypes.c_void_p),
    ]


class WindowAttentionArguments(ctypes.Structure):
    """`streamo_window_attention`."""

    _fields_ = [
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("window_count", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("qkv", ctypes.c_void_p),
        ("rope_cos", ctypes.c_void_p),
        ("rope_sin", ctypes.c_void_p),
        ("window_starts", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


class WeightsSource(ctypes.Structure):
    """`streamo_weights_source`."""

    _fields_ = [
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


class MatmulArguments(ctypes.Structure):
    """`streamo_matmul`."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("input", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("input_stride", ctypes.c_int64),
        ("output_stride", ctypes.c_int64),
    ]


_POINTER, _STATUS = ctypes.c_void_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "streamo_abi_version": (ctypes.c_int32, ()),
    "streamo_last_error": (ctypes.c_char_p, ()),
    "streamo_instruction_set": (ctypes.c_char_p, ()),
    "streamo_instruction_set_available": (ctypes.c_int32, (ctypes.c_char_p,)),
    "streamo_select_instruction_set": (_STATUS, (ctypes.c_char_p,)),
    "streamo_threads_create": (_POINTER, (ctypes.c_int32,)),
    "streamo_threads_destroy": (None, (_POINTER,)),
    "streamo_attention_run": (_STATUS, (ctypes.POINTER(AttentionArguments), _POINTER)),
    "streamo_attention_reference": (_STATUS, (ctypes.POINTER(AttentionArguments),)),
    "streamo_window_attention_run": (_STATUS, (ctypes.POINTER(WindowAttentionArguments), _POINTER)),
    "streamo_window_attention_reference": (_STATUS, (ctypes.POINTER(WindowAttentionArguments),)),
    "streamo_weights_pack": (_STATUS, (ctypes.POINTER(WeightsSource), _POINTER, ctypes.POINTER(_POINTER))),
    "streamo_weights_destroy": (None, (_POINTER,)),
    "streamo_weights_bytes": (ctypes.c_size_t, (_POINTER,)),
    "streamo_matmul_run": (_STATUS, (_POINTER, ctypes.POINTER(MatmulArguments), _POINTER)),
    "streamo_matmul_reference": (_STATUS, (ctypes.POINTER(WeightsSource), ctypes.POINTER(MatmulArguments))),
}


def library_path() -> Path:
    """The file that holds the kernels, whether it is there or not."""
    return Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name(LIBRARY_FILE))


@functools.cache
def load_library() -> Any:
    """The library, loaded once, with every function's signature.

    Raises:
      BackendError: it is switched off, was not built, does not load, is of another version, or cannot use the
        instruction set that the environment asks for.
    """
    path = library_path()
    if os.environ.get(LIBRARY_VARIABLE) == OFF:
        raise BackendError(f"The native kernels are switched off: {LIBRARY_VARIABLE} is `{OFF}`")
    if not path.is_file():
        raise BackendError(
            f"The native kernels are not there: `{path.name}` was not built when streamo-edge was installed",
            hint="Install a C++ compiler, then install streamo-edge again",
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BackendError(f"The native kernels in `{path.name}` do not load: {error}") from None
    version = library.streamo_abi_version()
    if version != ABI_VERSION:
        raise BackendError(
            f"The native kernels in `{path.name}` have interface version {version}, expected {ABI_VERSION}",
            hint="Install streamo-edge again",
        )
    _select_from_environment(library)
    return library


def _select_from_environment(library: Any) -> None:
    name = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if name and library.streamo_select_instruction_set(name.encode()) != 0:
        raise BackendError(f"{INSTRUCTION_SET_VARIABLE} is `{name}`: {last_error(library)}")


def last_error(library: Any) -> str:
    """Why the last call of this thread was refused."""
    return library.streamo_last_error().decode(errors="replace")

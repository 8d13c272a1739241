"""The GPU part of the native library's C interface, seen through ctypes.

Owns what `kernels/include/streamo_gpu.h` and `streamo_onnxruntime.h` say beyond `streamo_kernels.h`, once more in
ctypes, and what their statuses are among our errors. Knows no array.

Environment:
  STREAMO_CUDA_DRIVER: another library in place of the CUDA driver `libcuda.so.1`; for tests.
  STREAMO_EDGE_CUBINS: another folder with the GPU kernels' machine code than the one in this package.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge import kernels_abi
from edge.errors import BackendError, DeviceError, DeviceLostError, EdgeError, KernelError, MemoryBudgetError

CUBINS_VARIABLE = "STREAMO_EDGE_CUBINS"

PIXELS_RGB, PIXELS_NV12 = 0, 1
ACTIVATIONS_AUTO, ACTIVATIONS_FP16, ACTIVATIONS_INT8 = 0, 1, 2

BAD_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY, NO_DEVICE, NO_KERNEL, DEVICE_LOST, DEVICE_ERROR = range(1, 8)


class GpuFacts(ctypes.Structure):
    """`streamo_gpu_facts`."""

    _fields_ = [
        ("name", ctypes.c_char * 128),
        ("sm", ctypes.c_int32),
        ("kernel_sm", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("driver_version", ctypes.c_int32),
        ("integrated", ctypes.c_int32),
        ("memory_bytes", ctypes.c_int64),
        ("free_bytes", ctypes.c_int64),
    ]


class NormArguments(ctypes.Structure):
    """`streamo_gpu_norm`."""

    _fields_ = [
        ("rows", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("input", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


class SampleArguments(ctypes.Structure):
    """`streamo_gpu_sample`."""

    _fields_ = [
        ("vocabulary", ctypes.c_int32),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("random", ctypes.c_double),
        ("logits", ctypes.c_void_p),
        ("token", ctypes.c_void_p),
    ]


class FrameArguments(ctypes.Structure):
    """`streamo_gpu_frame`."""

    _fields_ = [
        ("pixels", ctypes.c_int32),
        ("full_range", ctypes.c_int32),
        ("bt709", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("plane_stride", ctypes.c_int64),
        ("chroma_stride", ctypes.c_int64),
        ("plane", ctypes.c_void_p),
        ("chroma", ctypes.c_void_p),
        ("new_width", ctypes.c_int32),
        ("new_height", ctypes.c_int32),
        ("patch", ctypes.c_int32),
        ("merge", ctypes.c_int32),
        ("mean", ctypes.c_float * 3),
        ("deviation", ctypes.c_float * 3),
        ("output", ctypes.c_void_p),
    ]


_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
_OUT, _OUT_SIZE = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)
_ATTENTION = ctypes.POINTER(kernels_abi.AttentionArguments)
_WINDOWS = ctypes.POINTER(kernels_abi.WindowAttentionArguments)
_WEIGHTS, _MATMUL = ctypes.POINTER(kernels_abi.WeightsSource), ctypes.POINTER(kernels_abi.MatmulArguments)
_NORM, _SAMPLE, _FRAME = map(ctypes.POINTER, (NormArguments, SampleArguments, FrameArguments))
_WORKSPACE = (_POINTER, _SIZE, _POINTER)  # memory, bytes, stream

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "streamo_gpu_count": (ctypes.POINTER(_NUMBER),),
    "streamo_gpu_open": (ctypes.c_char_p, _NUMBER, _OUT),
    "streamo_gpu_close": (_POINTER,),
    "streamo_gpu_get_facts": (_POINTER, ctypes.POINTER(GpuFacts)),
    "streamo_gpu_load": (_POINTER, ctypes.c_char_p),
    "streamo_gpu_alloc": (_POINTER, _SIZE, _OUT),
    "streamo_gpu_free": (_POINTER, _POINTER),
    "streamo_gpu_copy": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "streamo_gpu_fill": (_POINTER, _POINTER, ctypes.c_uint8, _SIZE, _POINTER),
    "streamo_gpu_stream_create": (_POINTER, _OUT),
    "streamo_gpu_stream_destroy": (_POINTER, _POINTER),
    "streamo_gpu_synchronize": (_POINTER, _POINTER),
    "streamo_gpu_event_create": (_POINTER, _OUT),
    "streamo_gpu_event_destroy": (_POINTER, _POINTER),
    "streamo_gpu_event_record": (_POINTER, _POINTER, _POINTER),
    "streamo_gpu_stream_wait": (_POINTER, _POINTER, _POINTER),
    "streamo_gpu_event_elapsed": (_POINTER, _POINTER, _POINTER, ctypes.POINTER(ctypes.c_float)),
    "streamo_gpu_graph_begin": (_POINTER, _POINTER),
    "streamo_gpu_graph_end": (_POINTER, _POINTER, _OUT),
    "streamo_gpu_graph_launch": (_POINTER, _POINTER, _POINTER),
    "streamo_gpu_graph_destroy": (_POINTER, _POINTER),
    "streamo_gpu_launch": (_POINTER, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_char_p, _OUT, _POINTER),
    "streamo_gpu_attention_table_bytes": (_NUMBER, _NUMBER, _NUMBER, _OUT_SIZE),
    "streamo_gpu_attention_table": (_ATTENTION, _NUMBER, _POINTER, _SIZE),
    "streamo_gpu_attention_workspace": (_POINTER, _ATTENTION, _OUT_SIZE),
    "streamo_gpu_attention_most_workspace": (_POINTER, _ATTENTION, _OUT_SIZE),
    "streamo_gpu_attention_run": (_POINTER, _ATTENTION, _POINTER, _NUMBER, *_WORKSPACE),
    "streamo_gpu_window_attention_workspace": (_POINTER, _WINDOWS, _OUT_SIZE),
    "streamo_gpu_window_attention_run": (_POINTER, _WINDOWS, _POINTER, *_WORKSPACE),
    "streamo_gpu_matmul_workspace": (_POINTER, _WEIGHTS, _MATMUL, _NUMBER, _OUT_SIZE),
    "streamo_gpu_matmul_most_workspace": (_POINTER, _WEIGHTS, _MATMUL, _NUMBER, _OUT_SIZE),
    "streamo_gpu_matmul_run": (_POINTER, _WEIGHTS, _MATMUL, _NUMBER, *_WORKSPACE),
    "streamo_gpu_norm_run": (_POINTER, _NORM, _POINTER),
    "streamo_gpu_sample_workspace": (_POINTER, _SAMPLE, _OUT_SIZE),
    "streamo_gpu_sample_run": (_POINTER, _SAMPLE, *_WORKSPACE),
    "streamo_gpu_frame_workspace": (_POINTER, _FRAME, _OUT_SIZE),
    "streamo_gpu_frame_run": (_POINTER, _FRAME, *_WORKSPACE),
    "streamo_onnxruntime_use_table": (_POINTER, _POINTER, _NUMBER, ctypes.POINTER(ctypes.c_int64)),
}

_HINTS = {
    NO_DEVICE: "Install a driver for this GPU, or use `--backend cpu`",
    NO_KERNEL: "Run with `--backend cpu`, or build the GPU kernels: `python kernels/gpu/compile.py`",
    DEVICE_LOST: "Restart this process; if it happens again, look for `Xid` in the kernel log (dmesg)",
    OUT_OF_MEMORY: "Use a smaller window, a bundle with fewer bits, or end other programs on the GPU",
}
_ERRORS: dict[int, type[EdgeError]] = {
    BAD_ARGUMENT: KernelError,
    UNSUPPORTED: KernelError,
    OUT_OF_MEMORY: MemoryBudgetError,
    NO_DEVICE: DeviceError,
    NO_KERNEL: DeviceError,
    DEVICE_LOST: DeviceLostError,
    DEVICE_ERROR: BackendError,
}


def cubin_folder() -> Path:
    """Where the GPU kernels' machine code is, whether it is there or not."""
    return Path(os.environ.get(CUBINS_VARIABLE) or Path(__file__).with_name("cubins"))


@functools.cache
def load_library() -> Any:
    """The native library, with the signatures of the GPU functions too; one that it lacks raises BackendError.

    Raises:
      BackendError: it cannot be used.
    """
    library = kernels_abi.load_library()
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            setattr(library, name, _missing(name))
            continue
        function.restype = None if name == "streamo_gpu_close" else ctypes.c_int
        function.argtypes = arguments
    return library


def _missing(name: str) -> Callable[..., int]:
    def refuse(*_: Any) -> int:
        raise BackendError(
            f"The native kernels in `{kernels_abi.library_path().name}` have no function `{name}`",
            hint="Install streamo-edge again",
        )

    return refuse


def accept(status: int) -> None:
    """Raise what a function of the library returned, if it is not 0.

    Raises:
      KernelError: an argument does not fit. MemoryBudgetError: too little memory.
      DeviceError: no GPU, no driver, one that is too old, or no kernels for this GPU.
      DeviceLostError: the GPU is unusable until the process ends. BackendError: anything else.
    """
    if status:
        sentence = (
            kernels_abi.last_error(kernels_abi.load_library()) or f"a call to the GPU failed with status {status}"
        )
        raise _ERRORS.get(status, BackendError)(sentence[0].upper() + sentence[1:], hint=_HINTS.get(status))

"""ONNX Runtime's CUDA provider: whether it can be used here, and how it is asked to run.

Owns its name, its options, and the words for what it lacks. Knows no graph and none of our kernels.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from edge.backends.ort_session import onnxruntime_module
from edge.contract import Manifest
from edge.errors import BackendError

PROVIDER = "CUDAExecutionProvider"
_INSTALL = 'pip uninstall -y onnxruntime; pip install "onnxruntime-gpu[cuda,cudnn]"; docs/gpu.md has the details'


def check_provider() -> None:
    """Say why the CUDA provider cannot be loaded; ONNX Runtime itself would go on with the CPU.

    Raises:
      BackendError: with the library that is missing.
    """
    runtime = onnxruntime_module()
    if PROVIDER not in runtime.get_available_providers():
        raise BackendError(
            f"This ONNX Runtime, {runtime.__version__}, is a build without CUDA: it has "
            f"{', '.join(runtime.get_available_providers())}",
            hint=_INSTALL,
        )
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # finds CUDA and cuDNN in packages of this Python
    folder = Path(runtime.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):
            path = folder / f"libonnxruntime_providers_{name}.so"
            if path.exists():
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(
            f"The CUDA provider of ONNX Runtime {runtime.__version__} cannot be loaded: {error}", hint=_INSTALL
        ) from None


def provider_options(manifest: Manifest, device: int, stream: int) -> dict[str, str]:
    """The provider's options: exact products for a bundle that has float32 weights, and our own stream."""
    exact = "fp32" in (manifest.vision.weights, manifest.decoder.weights)
    return {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",  # doubling would take twice the weights
        "use_tf32": "0" if exact else "1",
    }

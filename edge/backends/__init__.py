"""Inference backends: each runs a bundle's two graphs, and nothing else.

Owns the choice by name. A backend knows arrays and memory; it knows neither tokens, positions nor turns.
"""

from __future__ import annotations

from edge.backends.base import Backend
from edge.bundle import Bundle
from edge.errors import UsageError

ON_GPU = ("cuda", "tensorrt")


def evicts_in_place(name: str, bundle: Bundle) -> bool:
    """Whether `load_backend` would give a backend that can cut turns out of its cache. Loads no graph."""
    if name in ON_GPU:
        return True
    from edge.backends.ort import uses_native_graph

    return uses_native_graph(bundle.manifest.decoder)


def free_bytes(name: str) -> int | None:
    """Memory that the backend called `name` could have now; None if unknown.

    Raises:
      DeviceError: there is no GPU for it.
    """
    if name not in ON_GPU:
        from edge.memory import available_bytes

        return available_bytes()
    from edge.gpu import Gpu

    with Gpu() as gpu:
        return gpu.facts.free_bytes


def load_backend(
    name: str, bundle: Bundle, *, threads: int | None = None, require_gpu: bool = False, check: bool = True
) -> Backend:
    """Load the bundle's graphs with the backend called `name`, and see at a first run that it computes what it should.

    Args:
      require_gpu: refuse whatever would run on the CPU.
      check: compare the bundle's stored turns with what comes out here, unless they have been before: see `first_run`.

    Raises:
      UsageError: no such backend in this version, or one on the CPU where a GPU is required.
      BackendError: the backend's library is missing or cannot load the graphs.
      ParityError: the graphs compute something else here.
    """
    if require_gpu and name not in ON_GPU:
        raise UsageError(f"Backend `{name}` runs on the CPU, and a GPU is required", hint="Use `--backend cuda`")
    backend = _load(name, bundle, threads, require_gpu)
    if check:
        from edge.first_run import check_first_run

        check_first_run(bundle, backend, name)
    return backend


def _load(name: str, bundle: Bundle, threads: int | None, require_gpu: bool) -> Backend:
    if name == "cpu":
        from edge.backends.ort import OrtBackend

        return OrtBackend(bundle, threads=threads)
    if name == "cuda":
        from edge.backends.cuda import CudaBackend

        return CudaBackend(bundle, threads=threads, exclusive=require_gpu)
    if name == "tensorrt":
        from edge.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle)
    raise UsageError(f"Backend `{name}` is not available in this version", hint="Use `--backend cpu`")

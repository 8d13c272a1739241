"""Inference backends: each runs a bundle's two graphs, and nothing else.

Owns the choice by name. A backend knows arrays and memory; it knows neither tokens, positions nor turns.
"""

from __future__ import annotations

from edge.backends.base import Backend
from edge.bundle import Bundle
from edge.errors import UsageError


def evicts_in_place(name: str, bundle: Bundle) -> bool:
    """Whether `load_backend` would give a backend that can cut turns out of its cache. Loads no graph."""
    if name != "cpu":
        return False
    from edge.backends.ort import uses_native_graph

    return uses_native_graph(bundle.manifest.decoder)


def load_backend(name: str, bundle: Bundle, *, threads: int | None = None) -> Backend:
    """Load the bundle's graphs with the backend called `name`.

    Raises:
      UsageError: no such backend in this version.
      BackendError: the backend's library is missing or cannot load the graphs.
    """
    if name == "cpu":
        from edge.backends.ort import OrtBackend

        return OrtBackend(bundle, threads=threads)
    raise UsageError(f"Backend `{name}` is not available in this version", hint="Use `--backend cpu`")

"""One graph loaded in ONNX Runtime, for the parity check.

Owns the session's options and the mapping of ONNX Runtime's exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge.contract import MATMUL_ACCURACY_LEVEL
from edge.errors import BackendError
from export.memory import release_freed_memory

AS_RUNTIME = MATMUL_ACCURACY_LEVEL
"""Inner products of quantised weights in int8, as the runtime computes them: activations are rounded, too."""
EXACT = "1"
"""Inner products in float32: only the weights are rounded."""


class GraphSession:
    """A loaded graph.

    Args:
      accuracy_level: of products with quantised weights, `AS_RUNTIME` or `EXACT`.
      library: of our own operators, for a native graph.

    Raises:
      BackendError: ONNX Runtime is missing or cannot load the graph.
    """

    def __init__(self, path: Path, accuracy_level: str = AS_RUNTIME, library: str | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(f"ONNX Runtime cannot be loaded: {error}", hint="pip install onnxruntime") from None
        release_freed_memory()  # of the graph before this one
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # it would keep what a graph has freed
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy_level)
        self._name = f"`{path.name}` in ONNX Runtime {onnxruntime.__version__}"
        try:
            if library is not None:
                options.register_custom_ops_library(library)
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self._inputs = {value.name for value in self._session.get_inputs()}
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise BackendError(f"Cannot load {self._name}: {error}", hint="pip install -U onnxruntime") from None

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs, in the graph's order; feeds that it has no input for are left out.

        Raises:
          BackendError: the graph failed.
        """
        try:
            return list(self._session.run(None, {name: feeds[name] for name in self._inputs}))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise BackendError(f"Cannot run {self._name}: {error}") from None

"""One ONNX Runtime session: how it is configured, and how arrays become its inputs and outputs.

Owns every option that ONNX Runtime is given, and maps its exceptions. Does not know what the graphs compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge import contract
from edge.errors import BackendError
from edge.kernels_abi import LIBRARY_VARIABLE, OFF

_FIRST_WITH_INT8_BLOCKS = (1, 24)  # 1.23 does not fuse 8-bit blocked weights into MatMulNBits
_THREADS_ENTRY = "streamo.threads"
_PROVIDERS = ["CPUExecutionProvider"]


class OrtSession:
    """A loaded graph, run with arrays that the caller keeps alive.

    Args:
      path: the graph.
      weights: how the component's weights are stored: fp32, fp16, int8 or int4.
      threads: threads inside one operator; None leaves the choice to ONNX Runtime.
      library: the native kernels' library, for a native graph.

    Attributes:
      inputs, outputs: ONNX Runtime's description of each (`shape`, `type`), by name.

    Raises:
      BackendError: ONNX Runtime is not installed or cannot load the graph.
    """

    def __init__(self, path: Path, weights: str, *, threads: int | None, library: Path | None = None) -> None:
        runtime = _onnxruntime()
        try:
            options = _options(runtime, weights, threads, library)
            self._session = runtime.InferenceSession(str(path), options, providers=_PROVIDERS)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            hint = "Export the checkpoint again with this version of streamo-edge"
            if library is not None:
                hint += f", or set {LIBRARY_VARIABLE}={OFF} to do without the native kernels"
            raise BackendError(
                f"ONNX Runtime {runtime.__version__} cannot load `{path.name}`: {error}", hint=hint
            ) from None
        self._what = f"`{path.name}`"
        self._binding = self._session.io_binding()
        self.inputs: dict[str, Any] = {tensor.name: tensor for tensor in self._session.get_inputs()}
        self.outputs: dict[str, Any] = {tensor.name: tensor for tensor in self._session.get_outputs()}

    def bind(self, name: str, array: np.ndarray) -> None:
        """Use `array`'s memory as input `name` from now on."""
        self._binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def bind_output(self, name: str, array: np.ndarray) -> None:
        """Write output `name` to `array`'s memory from now on."""
        self._binding.bind_output(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def run_bound(self) -> None:
        """Run with what is bound.

        Raises:
          BackendError: an operator failed; says which, and why.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise BackendError(f"The graph {self._what} failed: {error}") from None

    def run(self, output: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run with arrays of this call alone; the result is a new array.

        Raises:
          BackendError: an operator failed; says which, and why.
        """
        try:
            return np.asarray(self._session.run([output], feeds)[0])
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise BackendError(f"The graph {self._what} failed: {error}") from None


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be loaded: {error}", hint="pip install onnxruntime") from None
    return onnxruntime


def _options(runtime: Any, weights: str, threads: int | None, library: Path | None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told once
    options.enable_mem_pattern = False  # turns differ in length; patterns would be kept for every one
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", contract.MATMUL_ACCURACY_LEVEL)
    if weights == "int8" and _version(runtime.__version__) < _FIRST_WITH_INT8_BLOCKS:
        # Else 8-bit blocks would be dequantised again on every run; so they become float32 once, at load.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Threads that spin between operators take a core from whoever else needs it, and power from a device that works a
    # few milliseconds a second; on two cores a turn is faster without, too (docs/benchmarks.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if library is not None:
        if threads is not None:
            options.add_session_config_entry(_THREADS_ENTRY, str(threads))
        options.register_custom_ops_library(str(library))
    return options


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])

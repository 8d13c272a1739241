"""One ONNX Runtime session: how it is configured, and how arrays become its inputs and outputs.

Owns every option that ONNX Runtime is given, and maps its exceptions. Does not know what the graphs compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge import contract
from edge.backends.place import Array, DevicePlace, HostPlace
from edge.errors import BackendError, EdgeError
from edge.kernels_abi import LIBRARY_VARIABLE, OFF

_FIRST_WITH_INT8_BLOCKS = (1, 24)  # 1.23 does not fuse 8-bit blocked weights into MatMulNBits
_THREADS_ENTRY = "streamo.threads"


@dataclass(frozen=True)
class Provider:
    """Which of ONNX Runtime's execution providers runs a session.

    Attributes:
      name: ONNX Runtime's own. options: the provider's own.
      entries: further configuration entries of the session.
      exclusive: refuse a graph of which any node would run on the CPU instead.
      diagnose: given ONNX Runtime's exception, has a better account of it, or None.
    """

    name: str = "CPUExecutionProvider"
    options: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    exclusive: bool = False
    diagnose: Callable[[Exception], EdgeError | None] = lambda error: None


CPU = Provider()


class OrtSession:
    """A loaded graph, run with arrays that the caller keeps alive.

    Args:
      path: the graph.
      weights: how the component's weights are stored: fp32, fp16, int8 or int4.
      threads: threads inside one operator; None leaves the choice to ONNX Runtime.
      library: the native kernels' library, for a native graph.
      provider, place: which of ONNX Runtime's providers runs it, and where the arrays are that will be bound.

    Attributes:
      inputs, outputs: ONNX Runtime's description of each (`shape`, `type`), by name.
      on_cpu: kinds of nodes that run on the CPU though another provider was wanted, where ONNX Runtime tells.

    Raises:
      BackendError: ONNX Runtime is not installed, cannot load the graph, or would not run it with `provider`.
    """

    def __init__(
        self,
        path: Path,
        weights: str,
        *,
        threads: int | None,
        library: Path | None = None,
        provider: Provider = CPU,
        place: HostPlace | DevicePlace | None = None,
    ) -> None:
        runtime = onnxruntime_module()
        self._what, self._diagnose = f"`{path.name}`", provider.diagnose
        self._place = place or HostPlace()
        try:
            options = _options(runtime, weights, threads, library, provider)
            # Without its own fallback, which prints to stdout and runs the graph on the CPU.
            self._session = runtime.InferenceSession(
                str(path), options, providers=[(provider.name, dict(provider.options))], enable_fallback=0
            )
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise self._diagnose(error) or _cannot_load(runtime, path, error, library, provider) from None
        if provider.name not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime {runtime.__version__} would run {self._what} with "
                f"{', '.join(self._session.get_providers())}, expected {provider.name}",
                hint="`streamo-edge doctor` says what is missing",
            )
        self._binding = self._session.io_binding()
        self._runs: dict[int, Any] = {}  # ONNX Runtime's options of a run, by the graph's number
        self.on_cpu = _nodes_on_cpu(self._session) if provider.name != CPU.name else []
        self.inputs: dict[str, Any] = {tensor.name: tensor for tensor in self._session.get_inputs()}
        self.outputs: dict[str, Any] = {tensor.name: tensor for tensor in self._session.get_outputs()}

    def bind(self, name: str, array: Array) -> None:
        """Use `array`'s memory as input `name` from now on."""
        self._binding.bind_input(name, *self._address(array))

    def bind_output(self, name: str, array: Array) -> None:
        """Write output `name` to `array`'s memory from now on."""
        self._binding.bind_output(name, *self._address(array))

    def _address(self, array: Array) -> tuple[str, int, Any, list[int], int]:
        """Device, its number, dtype, shape and pointer, as a binding takes them."""
        device, ordinal, pointer = self._place.address(array)
        return device, ordinal, array.dtype, list(array.shape), pointer

    def run_bound(self, graph: int | None = None) -> None:
        """Run with what is bound.

        Args:
          graph: of a session whose provider records CUDA graphs: the number to record this run under, or to run again
            what was recorded; see `step_graphs`.

        Raises:
          BackendError: an operator failed; says which, and why.
        """
        try:
            self._session.run_with_iobinding(self._binding, self._run_options(graph))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            raise self._diagnose(error) or BackendError(f"The graph {self._what} failed: {error}") from None

    def _run_options(self, graph: int | None) -> Any:
        if graph is None:
            return None
        if graph not in self._runs:
            self._runs[graph] = onnxruntime_module().RunOptions()
            self._runs[graph].add_run_config_entry("gpu_graph_id", str(graph))
        return self._runs[graph]


def onnxruntime_module() -> Any:
    """ONNX Runtime.

    Raises:
      BackendError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be loaded: {error}", hint="pip install onnxruntime") from None
    return onnxruntime


def _options(runtime: Any, weights: str, threads: int | None, library: Path | None, provider: Provider) -> Any:
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
    if provider.name != CPU.name:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider.exclusive:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name, value in provider.entries.items():
        options.add_session_config_entry(name, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    if library is not None:
        if threads is not None:
            options.add_session_config_entry(_THREADS_ENTRY, str(threads))
        options.register_custom_ops_library(str(library))
    return options


def _cannot_load(runtime: Any, path: Path, error: Exception, library: Path | None, provider: Provider) -> BackendError:
    where = "" if provider.name == CPU.name else f" with {provider.name}"
    hint = "Export the checkpoint again with this version of streamo-edge"
    if where:
        hint = "`streamo-edge doctor` says what is missing"
    elif library is not None:
        hint += f", or set {LIBRARY_VARIABLE}={OFF} to do without the native kernels"
    return BackendError(f"ONNX Runtime {runtime.__version__} cannot load `{path.name}`{where}: {error}", hint=hint)


def _nodes_on_cpu(session: Any) -> list[str]:
    """Kinds of nodes that ONNX Runtime gave to the CPU; versions before 1.24 do not tell."""
    told: list[Any] = getattr(session, "get_provider_graph_assignment_info", lambda: [])()
    return sorted({node.op_type for part in told if part.ep_name == CPU.name for node in part.get_nodes()})


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])

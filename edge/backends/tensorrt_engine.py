"""One TensorRT engine in memory, and one way to use it.

Owns TensorRT's objects at run time, and the mapping of their failures. Does not know what an engine computes.
"""

from __future__ import annotations

from typing import Any

from edge.engines.store import EngineStore
from edge.engines.toolkit import Messages, logger_of, start
from edge.errors import BackendError, EngineError, MemoryBudgetError
from edge.gpu import DeviceArray, Gpu
from edge.memory import bytes_text


class Engine:
    """A deserialised engine.

    Args:
      store: where it is kept; its file is checked before TensorRT sees a byte.
      stream: that its executions put their work on.

    Attributes:
      inputs: names of its inputs.

    Raises:
      EngineError: the file does not fit, or TensorRT refuses it.
    """

    def __init__(self, store: EngineStore, component: str, gpu: Gpu, stream: int) -> None:
        trt = store.toolkit.module
        self._trt, self._gpu, self._stream, self._name = trt, gpu, stream, component
        self._runtime = start(store.toolkit, "Runtime")
        _, self._messages = logger_of(store.toolkit)
        with store.opened(component) as plan:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"TensorRT {store.toolkit.text} cannot load the {component} engine "
                f"`{store.path(component)}`: {self._messages.told()}",
                hint="Run `streamo-edge build BUNDLE --force`",
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs = {name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}

    def execution(self, profile: int) -> Execution:
        """A way to use the engine with one of its profiles; its intermediate results take memory of their own.

        Raises:
          MemoryBudgetError: there is too little for them.
        """
        need = self._engine.get_device_memory_size_for_profile_v2(profile)
        free = self._gpu.facts.free_bytes
        context = None
        if need <= free:
            strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            said = f": {self._messages.told()}" if need <= free else ""
            raise MemoryBudgetError(
                f"The {self._name} engine takes {bytes_text(need)} of GPU memory for intermediate results, "
                f"{bytes_text(free)} is free{said}",
                hint="Use a smaller window, or end other programs on the GPU",
            )
        self._gpu.synchronize(self._stream)
        return Execution(self._name, context, self._gpu, self._stream, self._messages)


class Execution:
    """One context of an engine, with memory bound to its inputs and outputs."""

    def __init__(self, name: str, context: Any, gpu: Gpu, stream: int, messages: Messages) -> None:
        self._name, self._context, self._gpu, self._stream = name, context, gpu, stream
        self._messages = messages
        self._bound: dict[str, DeviceArray] = {}  # alive as long as it is in use

    def bind_input(self, name: str, array: DeviceArray) -> None:
        """Read input `name` from this memory, with this shape, from now on."""
        bound = self._bound.get(name)
        if bound is not None and (bound.pointer, bound.shape) == (array.pointer, array.shape):
            self._bound[name] = array  # said once more, TensorRT would prepare all its layers once more
            return
        if not self._context.set_input_shape(name, tuple(array.shape)):
            raise BackendError(
                f"The {self._name} engine does not take `{name}` of shape {array.shape}: {self._messages.told()}"
            )
        self._bind(name, array)

    def bind_output(self, name: str, array: DeviceArray) -> None:
        """Write output `name` to this memory from now on."""
        self._bind(name, array)

    def _bind(self, name: str, array: DeviceArray) -> None:
        if not self._context.set_tensor_address(name, array.pointer):
            raise BackendError(f"The {self._name} engine has no input or output `{name}`: {self._messages.told()}")
        self._bound[name] = array

    def run(self) -> None:
        """Put the engine's work on the stream.

        Raises:
          DeviceLostError: the GPU is unusable. BackendError: TensorRT or the plugin refused; says why.
        """
        self._messages.told()  # of before
        if not self._context.execute_async_v3(self._stream):
            said = self._messages.told()
            self._gpu.facts  # noqa: B018 - asks the device, and raises if it is lost
            raise BackendError(f"The {self._name} engine failed: {said}")

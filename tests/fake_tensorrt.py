"""A stand-in for the `tensorrt` package that holds its callers to the real signatures.

Names, arguments, defaults and return values are those of the package's bindings in 10.3, 10.13 and 11.1, as far as they
are used; whatever else is asked for raises AttributeError or TypeError, as there. What differs between versions differs
here. An engine of it runs its graph in onnx's evaluator, on memory that the process can read; it does not prove that
TensorRT builds the graph, nor what TensorRT computes.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tensorrt_operators import tensorrt_graph

OPERATORS = ("StreamoTableAttention", "StreamoMatMul")
VERSIONS = ("10.3.0", "10.13.2.6", "11.4.0")
DELAY_VARIABLE = "FAKE_TENSORRT_DELAY_S"


class Calls(list):
    """Every call that changes what is built, as (name, arguments)."""

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self if called == name]


class _Strict:
    """As pybind11's classes: attributes that are not declared cannot be set."""

    _settable: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._settable:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} that can be set")
        object.__setattr__(self, name, value)


class _HostMemory(bytes):
    """IHostMemory: bytes with a size."""

    @property
    def nbytes(self) -> int:
        return len(self)


class World:
    """What the fake does, for tests to change.

    Attributes:
      sm: of the GPU that is there; engines of another are refused.
      refused: operators that the parser does not take.
      build_error: message of a build that fails. corrupt_timing_cache: the cache is of another device.
      fail_execution: message with which executions fail.
      activation_bytes: of each profile. mark: what engines that are built now are told by.
      refusal: what the plugin refuses, which TensorRT's log does not have. no_builder: builders and runtimes cannot be
        made. interrupted_by_signal: Ctrl-C is pressed while TensorRT builds.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.calls = Calls()
        self.sm = 87
        self.refused: set[str] = set()
        self.build_error = ""
        self.corrupt_timing_cache = False
        self.fail_execution = ""
        self.activation_bytes = 1 << 20
        self.built_version = version
        self.mark = ""
        self.refusal = self.refused_now = ""
        self.no_builder = False
        self.loggers: list[Any] = []
        self.interrupted_by_signal = False
        self.loaded_libraries: list[str] = []
        self.interrupt_at_step = -1
        self.executions: list[tuple[str, int, dict[str, tuple[int, ...]]]] = []

    def take_refusals(self) -> bytes:
        """What the plugin says that it refused, once."""
        found, self.refused_now = self.refused_now, ""
        return found.encode()

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def make_module(version: str = "10.3.0") -> tuple[types.ModuleType, World]:
    """A module to put into `sys.modules["tensorrt"]`, and what it does."""
    world = World(version)
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    old = world.major < 11

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def __init__(self) -> None:
            self._ready = True

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class Logger(ILogger):
        def log(self, severity: Severity, msg: str) -> None:
            print(msg, file=sys.stderr)

    class IProgressMonitor:
        def __init__(self) -> None:
            self._ready = True

    flags = ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if old else ["STRONGLY_TYPED"]
    flag_values = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    weak = ["FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"]
    common = ["DEBUG", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "TF32", "SPARSE_WEIGHTS", "STRIP_PLAN"]
    features = ["PROFILE_SHARING_0806", "ALIASED_PLUGIN_IO_10_03"] if old else ["ALIASED_PLUGIN_IO_10_03"]
    enums = {
        "NetworkDefinitionCreationFlag": {name: flag_values[name] for name in flags},
        "BuilderFlag": {name: i for i, name in enumerate([*(weak if old else []), *common])},
        "MemoryPoolType": {"WORKSPACE": 0, "TACTIC_DRAM": 4, "TACTIC_SHARED_MEMORY": 5},
        "PreviewFeature": {name: i for i, name in enumerate(features)},
        "ExecutionContextAllocationStrategy": {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2},
        "TensorIOMode": {"NONE": 0, "INPUT": 1, "OUTPUT": 2},
    }
    for name, members in enums.items():
        setattr(module, name, enum.IntEnum(name, members))
    for kind in (ILogger, Logger, IProgressMonitor):
        setattr(module, kind.__name__, kind)
    _add_registry(module, world)
    _add_builder(module, world)
    _add_runtime(module, world)
    return module, world


def _add_registry(module: types.ModuleType, world: World) -> None:
    class IPluginRegistry:
        def load_library(self, plugin_path: str) -> object | None:
            world.calls.append(("load_library", (plugin_path,)))
            if not isinstance(plugin_path, str):
                raise TypeError("plugin_path should be a str")
            if not Path(plugin_path).is_file():
                return None
            world.loaded_libraries.append(plugin_path)
            return object()

        def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:
            known = world.loaded_libraries and type in OPERATORS and (version, plugin_namespace) == ("1", "streamo")
            return object() if known else None

    registry = IPluginRegistry()
    module.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]


def _need(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} should be a {kind.__name__}, found {type(value).__name__}")


def _add_builder(module: types.ModuleType, world: World) -> None:
    trt: Any = module

    class ITensor(_Strict):
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self._name, self._shape = name, shape

        name = property(lambda self: self._name)
        shape = property(lambda self: self._shape)

    class INetworkDefinition(_Strict):
        def __init__(self, flags: int) -> None:
            self._flags, self._inputs, self._path = flags, [], None

        num_inputs = property(lambda self: len(self._inputs))

        def get_input(self, index: int) -> ITensor:
            return self._inputs[index]

    class ParserError:
        def __init__(self, node: int, name: str, operator: str, text: str) -> None:
            self._facts = (node, name, operator, text)

        def node(self) -> int:
            return self._facts[0]

        def node_name(self) -> str:
            return self._facts[1]

        def node_operator(self) -> str:
            return self._facts[2]

        def desc(self) -> str:
            return self._facts[3]

    class OnnxParser(_Strict):
        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            _need(network, INetworkDefinition, "network")
            _need(logger, trt.ILogger, "logger")
            self._network, self._errors = network, []

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

        def parse_from_file(self, model: str) -> bool:
            _need(model, str, "model")
            world.calls.append(("parse_from_file", (model,)))
            graph = onnx.load(model, load_external_data=False).graph
            registered = trt.get_plugin_registry()
            for index, node in enumerate(graph.node):
                plugin = node.domain != "" or node.op_type in OPERATORS
                found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                namespace = found.get("plugin_namespace", b"").decode()
                missing = plugin and not registered.get_creator(
                    node.op_type, found.get("plugin_version", b"1").decode(), namespace
                )
                if node.op_type in world.refused or missing:
                    text = "Plugin not found" if missing else "No importer registered for this\nop"
                    self._errors.append(ParserError(index, node.name, node.op_type, text))
            for value in graph.input:
                sizes = value.type.tensor_type.shape.dim
                shape = tuple(-1 if size.dim_param else size.dim_value for size in sizes)
                self._network._inputs.append(ITensor(value.name, shape))
            self._network._path = model
            return not self._errors

    class IOptimizationProfile(_Strict):
        def __init__(self) -> None:
            self._shapes: dict[str, list[tuple[int, ...]]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if not all(low <= mid <= high for low, mid, high in zip(min, opt, max, strict=True)):
                raise ValueError(f"{input}: {min} <= {opt} <= {max} does not hold")
            self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]

    class ITimingCache(_Strict):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> _HostMemory:
            return _HostMemory(self._content + b"t")

    class IBuilderConfig(_Strict):
        _settable = frozenset({"progress_monitor", "builder_optimization_level", "max_aux_streams"})

        def __init__(self) -> None:
            self._profiles: list[IOptimizationProfile] = []
            self._cache: ITimingCache | None = None
            self._features: set[Any] = set()

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            _need(pool, trt.MemoryPoolType, "pool")
            world.calls.append(("set_memory_pool_limit", (pool, pool_size)))

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            _need(feature, trt.PreviewFeature, "feature")
            world.calls.append(("set_preview_feature", (feature, enable)))
            if enable:
                self._features.add(feature)

        def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
            content = bytes(memoryview(serialized_timing_cache))
            return None if content.startswith(b"garbage") else ITimingCache(content)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            _need(cache, ITimingCache, "cache")
            if world.corrupt_timing_cache and cache._content:
                return False
            self._cache = cache
            world.calls.append(("set_timing_cache", (cache._content, ignore_mismatch)))
            return True

        def get_timing_cache(self) -> ITimingCache | None:
            return self._cache

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            _need(profile, IOptimizationProfile, "profile")
            self._profiles.append(profile)
            return len(self._profiles) - 1

    class Builder(_Strict):
        def __init__(self, logger: Any) -> None:
            _start(world, trt, logger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            world.calls.append(("create_network", (flags,)))
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> _HostMemory | None:
            _need(network, INetworkDefinition, "network")
            _need(config, IBuilderConfig, "config")
            world.calls.append(("build_serialized_network", (network._path,)))
            typed = world.major >= 11 or network._flags & 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            if not typed:
                self._logger.log(trt.ILogger.Severity.ERROR, "float16 tensors in a network that is not strongly typed")
                return None
            if world.refusal:
                world.refused_now = world.refusal
                self._logger.log(trt.ILogger.Severity.ERROR, "Plugin layer failed to configure")
                return None
            if world.interrupted_by_signal:
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:  # in C++ it ends as a line on stderr
                    self._logger.log(trt.ILogger.Severity.ERROR, "Exception caught in stepComplete()")
                    return None
            if world.build_error:
                self._logger.log(trt.ILogger.Severity.ERROR, world.build_error)
                return None
            if not _told(config.progress_monitor, world):
                return None
            for profile in config._profiles:
                missing = {tensor.name for tensor in network._inputs} - profile._shapes.keys()
                if missing:
                    raise AssertionError(f"no shapes for {missing}")
            plan = {
                "version": world.built_version,
                "sm": world.sm,
                "mark": world.mark,
                "graph": network._path,
                "profiles": [profile._shapes for profile in config._profiles],
                "aliased": trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03 in config._features,
            }
            return _HostMemory(json.dumps(plan).encode())

    for kind in (Builder, OnnxParser):
        setattr(module, kind.__name__, kind)


def _start(world: World, trt: Any, logger: Any) -> None:
    _need(logger, trt.ILogger, "logger")
    if world.loggers and logger not in world.loggers:
        raise AssertionError("TensorRT would go on with the logger that it was given first")
    world.loggers.append(logger)
    if world.no_builder:
        logger.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")


def _told(monitor: Any, world: World) -> bool:
    """Go through the phases of a build; whether it may go on."""
    steps = 4
    monitor.phase_start("Building Engine", None, steps)
    for step in range(steps):
        monitor.phase_start("Tactics", "Building Engine", 1)
        monitor.step_complete("Tactics", 0)
        monitor.phase_finish("Tactics")
        time.sleep(float(os.environ.get(DELAY_VARIABLE, "0")) / steps)
        if step == world.interrupt_at_step:
            monitor.interrupted = True
        if not monitor.step_complete("Building Engine", step):
            return False
    monitor.phase_finish("Building Engine")
    return True


def _add_runtime(module: types.ModuleType, world: World) -> None:
    trt: Any = module

    class IExecutionContext(_Strict):
        def __init__(self, engine: Any) -> None:
            self._engine, self._profile, self._shapes, self._addresses = engine, None, {}, {}

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            _need(stream_handle, int, "stream_handle")
            if not 0 <= profile_index < len(self._engine._plan["profiles"]):
                return False
            self._profile = profile_index
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            _need(shape, tuple, "shape")
            least, _, most = self._engine._plan["profiles"][self._profile][name]
            fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
            if not fits:
                self._engine._logger.log(
                    trt.ILogger.Severity.ERROR, f"{name}: {shape} is not between {least} and {most}"
                )
                return False
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            _need(memory, int, "memory")
            assert not memory % 256, f"{name} is not aligned to 256 bytes"
            world.calls.append(("set_tensor_address", (name, memory)))
            self._addresses[name] = memory
            return name in self._engine._names

        def execute_async_v3(self, stream_handle: int) -> bool:
            _need(stream_handle, int, "stream_handle")
            if world.fail_execution:
                self._engine._logger.log(trt.ILogger.Severity.ERROR, world.fail_execution)
                return False
            return self._engine._execute(self)

    class ICudaEngine(_Strict):
        def __init__(self, plan: dict[str, Any], logger: Any) -> None:
            self._plan, self._logger = plan, logger
            self._graph = tensorrt_graph(Path(plan["graph"]))
            self._inputs = list(self._graph.input_names)
            self._outputs = list(self._graph.output_names)
            self._names = [*self._inputs, *self._outputs]
            graph = onnx.load(plan["graph"], load_external_data=False).graph
            self._types = {
                v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)
                for v in (*graph.input, *graph.output)
            }

        num_io_tensors = property(lambda self: len(self._names))

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return world.activation_bytes

        def create_execution_context(self, strategy: Any = None) -> IExecutionContext:
            _need(strategy, trt.ExecutionContextAllocationStrategy, "strategy")
            return IExecutionContext(self)

        def _execute(self, context: IExecutionContext) -> bool:
            feeds = {}
            for name in self._inputs:
                address, shape = context._addresses[name], context._shapes[name]
                feeds[name] = _memory(address, shape, self._types[name]).copy()
            world.executions.append((Path(self._plan["graph"]).name, context._profile, dict(context._shapes)))
            for name, values in zip(self._outputs, self._graph.run(None, feeds), strict=True):
                address = context._addresses[name]
                if name.endswith(".updated") and self._plan["aliased"]:
                    assert address == context._addresses[name.removesuffix(".updated")], "not the input's memory"
                _memory(address, values.shape, self._types[name])[...] = values
            return True

    class Runtime(_Strict):
        def __init__(self, logger: Any) -> None:
            _start(world, trt, logger)
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            plan = json.loads(bytes(memoryview(serialized_engine)))
            world.calls.append(("deserialize_cuda_engine", (bytes(memoryview(serialized_engine)),)))
            if (plan["version"], plan["sm"]) != (world.version, world.sm):
                self._logger.log(trt.ILogger.Severity.ERROR, "Version tag does not match")
                return None
            return ICudaEngine(plan, self._logger)

    module.Runtime = Runtime  # type: ignore[attr-defined]


def _memory(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return (
        np.frombuffer((ctypes.c_byte * size).from_address(address), np.uint8)[
            : int(np.prod(shape)) * np.dtype(dtype).itemsize
        ]
        .view(dtype)
        .reshape(shape)
    )

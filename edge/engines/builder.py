"""One graph to one serialised engine, by the `tensorrt` package.

Owns every option that TensorRT's builder is given, and the mapping of its failures. Does not know where engines are
kept, nor what the graph computes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.engines.profiles import Profile
from edge.engines.progress import Report, interrupting, make_monitor
from edge.engines.toolkit import Messages, TensorRT, logger_of, start
from edge.errors import EngineError, MemoryBudgetError

MOST_NODES_LISTED = 5


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose.

    Attributes:
      workspace_bytes: memory that one of TensorRT's layers or the plugin may take for intermediate results; with less
        than the plugin asks for there is no engine.
      optimization_level: 0 to 5; higher builds take longer and try more.
    """

    workspace_bytes: int = 512 << 20
    optimization_level: int = 3


def build_engine(
    toolkit: TensorRT,
    graph: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    timing_cache: Path,
    report: Report,
) -> Any:
    """Build an engine of the graph in `graph`; its weights are read from the files beside it.

    Args:
      timing_cache: where TensorRT's measurements are kept for the next build; the file need not exist.

    Returns:
      The serialised engine, an object with the buffer protocol.

    Raises:
      EngineError: TensorRT refuses the graph, saying which nodes, or cannot build it.
      MemoryBudgetError: it ran out of memory.
    """
    trt, builder = toolkit.module, start(toolkit, "Builder")
    logger, messages = logger_of(toolkit)
    network = builder.create_network(toolkit.network_flags)
    _parse(toolkit, network, logger, graph, messages)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.builder_optimization_level = options.optimization_level
    _set_timing_cache(config, timing_cache)
    for profile in profiles:
        _add_profile(builder, network, config, profile)
    monitor = make_monitor(toolkit, report)
    config.progress_monitor = monitor
    with interrupting(monitor):
        plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise _build_error(graph, toolkit, messages)
    _keep_timing_cache(config, timing_cache)
    return plan


def _parse(toolkit: TensorRT, network: Any, logger: Any, graph: Path, messages: Messages) -> None:
    parser = toolkit.module.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    nodes = []
    for index in range(min(parser.num_errors, MOST_NODES_LISTED)):
        error = parser.get_error(index)
        what = f"{error.node_operator()} `{error.node_name()}`" if error.node_operator() else "the model"
        nodes.append(f"{what}: {' '.join(error.desc().split())}")
    more = parser.num_errors - len(nodes)
    listed = "; ".join(nodes) + (f"; and {more} more" if more > 0 else "")
    raise EngineError(
        f"TensorRT {toolkit.text} cannot read `{graph.name}`: {listed or messages.told()}",
        hint="Export the checkpoint again with this version of streamo-edge; see docs/tensorrt.md for what it needs",
    )


def _add_profile(builder: Any, network: Any, config: Any, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        made.set_shape(tensor.name, *profile.shapes(tensor.name, tuple(tensor.shape)))
    if config.add_optimization_profile(made) < 0:
        sizes = ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in profile.sizes.items())
        raise EngineError(f"TensorRT refuses the sizes of the profile `{profile.name}`: {sizes}")


def _set_timing_cache(config: Any, path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):  # damaged, or another device's
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timing_cache(config: Any, path: Path) -> None:
    """A lost timing cache costs the next build some minutes, and nothing else."""
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(memoryview(content))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def _build_error(graph: Path, toolkit: TensorRT, messages: Messages) -> EngineError | MemoryBudgetError:
    said = messages.told()
    if any(word in said.lower() for word in ("out of memory", "outofmemory", "cudaerrormemoryallocation", "bad_alloc")):
        return MemoryBudgetError(
            f"TensorRT ran out of memory while building `{graph.name}`: {said}",
            hint="Close other programs, add swap, or build with a smaller `--workspace-mib`",
        )
    little_room = "workspace" in said.lower()
    return EngineError(
        f"TensorRT {toolkit.text} cannot build an engine of `{graph.name}`: {said}",
        hint="Build with a larger `--workspace-mib`" if little_room else "See docs/tensorrt.md for what is supported",
    )

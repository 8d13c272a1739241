"""The plugin library: where it is, whether it fits what is here, and loading it.

Owns the search, in this order: the file that STREAMO_TENSORRT_PLUGIN names; one in this package; one in the user's
cache folder, where `streamo-edge build-plugin` puts it. How it is compiled is `plugin_build`'s.

Environment:
  STREAMO_TENSORRT_PLUGIN: the plugin library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge import contract, kernels_abi
from edge.engines.toolkit import TensorRT, logger_of
from edge.errors import EngineError
from edge.user_cache import own_cache_folder

PLUGIN_VARIABLE = "STREAMO_TENSORRT_PLUGIN"
PLUGIN_FILE = "libstreamo_tensorrt.so"
BUILD_HINT = "Run `streamo-edge build-plugin`"
VERSION_FUNCTION, SOURCES_FUNCTION = "streamo_tensorrt_version", "streamo_tensorrt_sources"
MESSAGES_FUNCTION = "streamo_tensorrt_messages"
SOURCES = (
    "adapters/tensorrt/plugin.cpp",
    "adapters/tensorrt/attributes.h",
    "adapters/tensorrt/device.h",
    "adapters/tensorrt/operator.h",
    "include/streamo_gpu.h",
    "include/streamo_kernels.h",
)
"""What the plugin is compiled from, besides TensorRT's and CUDA's headers: first what the compiler is given."""

_loaded: dict[str, object] = {}
"""Handles of plugin libraries by path: TensorRT's registry takes each once in a process."""


@dataclass(frozen=True)
class Plugin:
    """A plugin library.

    Attributes:
      sha256: of the file and of the native library that it calls, which says how much scratch memory an engine
        reserves; part of what an engine depends on.
    """

    path: Path
    sha256: str


def built_path(toolkit_text: str) -> Path:
    """Where the plugin for one version of TensorRT is built to."""
    return own_cache_folder() / f"tensorrt-{toolkit_text}" / PLUGIN_FILE


def find_plugin(toolkit: TensorRT) -> Plugin:
    """The plugin library for this TensorRT.

    Raises:
      EngineError: it was not built, cannot be read, or was built for another TensorRT or from other sources.
    """
    given = os.environ.get(PLUGIN_VARIABLE)
    packaged, own = Path(__file__).parent.with_name(PLUGIN_FILE), built_path(toolkit.text)
    places = [Path(given)] if given else [packaged, own]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise EngineError(
            f"The TensorRT plugin was not built for TensorRT {toolkit.text}: expected `{places[-1]}`",
            hint=f"Set {PLUGIN_VARIABLE} to the library, or unset it" if given else BUILD_HINT,
        )
    try:
        content = path.read_bytes() + _native_library()
    except OSError as error:
        raise EngineError(f"The TensorRT plugin `{path}` cannot be read: {error.strerror}", hint=BUILD_HINT) from None
    _check_made_for(path, toolkit)
    return Plugin(path, hashlib.sha256(content).hexdigest())


def sources_folder() -> Path | None:
    """What holds the plugin's sources, in a checkout or where the install put them; None where there are none."""
    package = Path(__file__).resolve().parent.parent
    places = (package / "plugin_sources", package.with_name("kernels"))
    return next((place for place in places if all((place / name).is_file() for name in SOURCES)), None)


def sources_digest(folder: Path) -> str:
    """What stands for the sources in `folder`: a plugin compiled from others has another interface."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def _check_made_for(path: Path, toolkit: TensorRT) -> None:
    """Its interfaces are those of the headers it was compiled with: TensorRT's, and the native library's."""
    try:
        library = _open(path)
        number, sources = getattr(library, VERSION_FUNCTION)(), getattr(library, SOURCES_FUNCTION)().decode()
    except (OSError, AttributeError) as error:
        raise EngineError(f"The TensorRT plugin `{path}` cannot be loaded: {error}", hint=BUILD_HINT) from None
    built = (number // 10000, number // 100 % 100)
    if built != toolkit.version[:2]:
        raise EngineError(
            f"The TensorRT plugin `{path}` was built for TensorRT {built[0]}.{built[1]}, expected {toolkit.text}",
            hint=BUILD_HINT,
        )
    folder = sources_folder()
    own = sources_digest(folder) if folder else ""
    if own and sources and sources != own:
        raise EngineError(
            f"The TensorRT plugin `{path}` was built with another version of streamo-edge: from sources {sources}, "
            f"expected {own}",
            hint=BUILD_HINT,
        )


def _open(path: Path) -> Any:
    """The library, through ctypes. OSError, AttributeError: it cannot be loaded, or is not such a one."""
    kernels_abi.load_library()  # first, so that the plugin calls this one and not the one it was linked with
    library = ctypes.CDLL(str(path))
    for name in (SOURCES_FUNCTION, MESSAGES_FUNCTION):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _native_library() -> bytes:
    path = kernels_abi.library_path()
    return path.read_bytes() if path.is_file() else b""


def load_plugin(toolkit: TensorRT, plugin: Plugin) -> None:
    """Make the plugin's operators known to TensorRT, once in a process.

    Raises:
      EngineError: TensorRT does not take it.
    """
    registry, key = toolkit.module.get_plugin_registry(), str(plugin.path)
    if key not in _loaded:
        handle = registry.load_library(key)
        if handle is None:
            raise EngineError(f"TensorRT {toolkit.text} does not load the plugin `{plugin.path}`", hint=BUILD_HINT)
        _loaded[key] = handle
        library = _open(plugin.path)
        logger_of(toolkit)[1].ask = lambda: getattr(library, MESSAGES_FUNCTION)().decode(errors="replace").splitlines()
    for name in (contract.TABLE_ATTENTION, contract.PLUGIN_MATMUL):
        if registry.get_creator(name, contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE) is None:
            raise EngineError(
                f"The TensorRT plugin `{plugin.path}` has no operator `{name}` of version {contract.PLUGIN_VERSION}",
                hint=BUILD_HINT,
            )

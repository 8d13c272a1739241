"""Compiles the TensorRT plugin on the device, against the device's own TensorRT headers.

Owns the search for what that takes, and the one call of the compiler. Nothing is downloaded: TensorRT's headers come
with TensorRT's development package, and are not ours to ship.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.engines.plugin import PLUGIN_FILE, SOURCES, built_path, sources_digest, sources_folder
from edge.errors import EngineError
from edge.kernels_abi import library_path

TENSORRT_HEADER, CUDA_HEADER, VERSION_HEADER = "NvInfer.h", "cuda_runtime_api.h", "NvInferVersion.h"
TENSORRT_FOLDERS = (
    "/usr/include/aarch64-linux-gnu",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
)
CUDA_FOLDERS = ("/usr/local/cuda/include", "/usr/local/cuda/targets/aarch64-linux/include", "/usr/include")
COMPILERS = ("c++", "g++", "clang++")
STANDARD_FOLDER = Path("/usr/include")
"""Searched anyway; named once more it would come before the compiler's own headers, which need it behind them."""
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_ERROR_LINES = 6


@dataclass(frozen=True)
class PluginBuild:
    """Everything that compiling the plugin takes.

    Attributes:
      sources: the folder that holds `adapters/` and `include/`.
      kernels: the native library, which launches the GPU kernels.
      version: of the TensorRT headers, as text.
    """

    compiler: str
    sources: Path
    tensorrt: Path
    cuda: Path
    kernels: Path
    version: str

    def command(self, output: Path) -> list[str]:
        """The compiler's command line. The plugin finds the native library where it is now."""
        foreign = [folder for folder in (self.tensorrt, self.cuda) if folder.resolve() != STANDARD_FOLDER]
        includes = [f"-I{self.sources / 'include'}", *(f"-isystem{folder}" for folder in foreign)]
        own = f'-DSTREAMO_PLUGIN_SOURCES="{sources_digest(self.sources)}"'
        link = [str(self.kernels), f"-Wl,-rpath,{self.kernels.parent}", "-Wl,--no-undefined", "-ldl"]
        return [self.compiler, *FLAGS, own, *includes, str(self.sources / SOURCES[0]), "-o", str(output), *link]


def plan_build(tensorrt: str | None = None, cuda: str | None = None) -> PluginBuild:
    """Find what is needed.

    Args:
      tensorrt: the folder with TensorRT's headers, or the one above its `include`; None searches the usual places.
      cuda: the same for CUDA's.

    Raises:
      EngineError: something is missing; the hint says what to install.
    """
    compiler = next((found for found in map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS)) if found), None)
    if compiler is None:
        raise EngineError("There is no C++ compiler", hint="sudo apt install g++")
    headers = _folder_with(TENSORRT_HEADER, tensorrt, TENSORRT_FOLDERS)
    if headers is None:
        raise _missing(TENSORRT_HEADER, "TensorRT's C++ headers", tensorrt, "libnvinfer-headers-dev", "--tensorrt DIR")
    toolkit = _folder_with(CUDA_HEADER, cuda, CUDA_FOLDERS)
    if toolkit is None:
        raise _missing(CUDA_HEADER, "CUDA's headers", cuda, "cuda-cudart-dev-12-6 (or your version's)", "--cuda DIR")
    kernels = library_path()
    if not kernels.is_file():
        raise EngineError(f"The native kernels are missing: expected `{kernels}`", hint="Install streamo-edge again")
    return PluginBuild(compiler, _sources(), headers, toolkit, kernels, _version_of(headers))


def build_plugin(build: PluginBuild, output: Path | None = None) -> Path:
    """Compile it; the library appears whole or not at all.

    Args:
      output: where to; None: where it is looked for.

    Raises:
      EngineError: the compiler fails; its first errors are in the message.
    """
    path = output or built_path(build.version)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(build.command(partial), capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(
                f"The TensorRT plugin cannot be compiled with {build.compiler}: {_errors(done.stderr)}",
                hint=f"Check that `{build.tensorrt}` and `{build.cuda}` belong together, or name others with "
                "--tensorrt and --cuda",
            )
        os.replace(partial, path)
    except OSError as error:
        raise EngineError(
            f"The TensorRT plugin cannot be written to `{path}`: {error.strerror}", hint="Name a file with --output"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _folder_with(header: str, given: str | None, usual: Sequence[str]) -> Path | None:
    places = [Path(given), Path(given, "include")] if given else [Path(folder) for folder in usual]
    return next((place for place in places if (place / header).is_file()), None)


def _missing(header: str, what: str, given: str | None, package: str, option: str) -> EngineError:
    where = f"in `{given}`" if given else "in the usual places"
    return EngineError(
        f"{what} are missing: there is no `{header}` {where}", hint=f"sudo apt install {package}, or give {option}"
    )


def _sources() -> Path:
    folder = sources_folder()
    if folder is None:
        raise EngineError(
            f"The plugin's source `{Path(SOURCES[0]).name}` is missing", hint="Install streamo-edge again"
        )
    return folder


def _version_of(headers: Path) -> str:
    """`10.3.0`, from the version header; its numbers may be names of other numbers in it."""
    try:
        text = (headers / VERSION_HEADER).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    values: dict[str, str] = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", text))
    numbers = []
    for name in ("MAJOR", "MINOR", "PATCH"):
        value = values.get(f"NV_TENSORRT_{name}", "")
        value = values.get(value, value)
        if not value.isdigit():
            raise EngineError(
                f"`{headers / VERSION_HEADER}` does not say which version of TensorRT it is of",
                hint="Install TensorRT's development package again",
            )
        numbers.append(value)
    return ".".join(numbers)


def _errors(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
    return "; ".join(line.strip() for line in lines[:_ERROR_LINES]) or "no message"


__all__ = ["PLUGIN_FILE", "PluginBuild", "build_plugin", "plan_build"]

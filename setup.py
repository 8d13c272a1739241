"""Builds the native kernels into the `edge` package.

Everything else about the package is in pyproject.toml. The library is loaded with ctypes, so one wheel per platform
serves every Python. Without a C++ compiler the install goes on, and the runtime uses stock operators.

Environment: CMAKE_ARGS is passed on to cmake; STREAMO_EDGE_REQUIRE_KERNELS=1 makes a failed build an error.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARY = "libstreamo_kernels.so"
PLUGIN_SOURCES = ("adapters/tensorrt/*", "include/*")
REQUIRED_VARIABLE = "STREAMO_EDGE_REQUIRE_KERNELS"


class BuildKernels(build_ext):
    """Runs cmake in place of a list of sources."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "kernels"
        try:
            run_cmake(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get(REQUIRED_VARIABLE) == "1":
                raise
            warn(error)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "kernels" / LIBRARY, target)
        copy_plugin_sources(target.parent / "plugin_sources")


def copy_plugin_sources(target: Path) -> None:
    """What `streamo-edge build-plugin` compiles on a device, which has no checkout."""
    if target.parent == ROOT / "edge":  # in a checkout they are at hand
        return
    kernels = ROOT / "kernels"
    for source in (path for pattern in PLUGIN_SOURCES for path in sorted(kernels.glob(pattern))):
        copy = target / source.relative_to(kernels)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def run_cmake(folder: Path) -> None:
    """Configure and build in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-DCMAKE_BUILD_TYPE=Release", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options], check=True)
    subprocess.run(["cmake", "--build", str(folder), "--config", "Release", "--parallel", jobs], check=True)


def warn(error: Exception) -> None:
    lines = (
        "The native kernels of streamo-edge were not built; the runtime will use stock operators, which are slower.",
        f"Reason: {error}",
        "Install a C++17 compiler (on Debian and Ubuntu: apt install g++), then install streamo-edge again.",
    )
    print("\n".join(f"WARNING: {line}" for line in lines), file=sys.stderr, flush=True)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("edge.kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

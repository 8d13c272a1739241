"""Loads the files of this folder as modules, although the folder is no Python package.

An importable `kernels` would get in other libraries' way, so the folder is given a name of its own that only this file
knows. Files here import each other relatively (`from .variant import Variant`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAME = "streamo_gpu_kernels"


def gpu_module(name: str) -> types.ModuleType:
    """The file `name`.py of this folder, loaded once."""
    _name_the_folder()
    return importlib.import_module(f"{NAME}.{name}")


def kernel_file(path: Path) -> types.ModuleType:
    """A kernel file from another folder, loaded as if it were in this one."""
    _name_the_folder()
    name = f"{NAME}.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"`{path}` is no Python file")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def _name_the_folder() -> None:
    if NAME not in sys.modules:
        folder = types.ModuleType(NAME, "The files of kernels/gpu.")
        folder.__path__ = [str(FOLDER)]
        sys.modules[NAME] = folder


def kernel_files() -> list[types.ModuleType]:
    """Every module of this folder that defines `variants`, except the table of them all, by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    others = {"archive", "build", "compile", "cubin", "load", "report", "steps", "variant", "variants"}
    modules = [gpu_module(name) for name in names if name not in others]
    return [module for module in modules if hasattr(module, "variants")]

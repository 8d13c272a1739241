"""`streamo-edge doctor`: what is here, what each backend lacks, and the next step for it.

Owns the list of what is looked at. Starts no model; each fact is asked for by itself: one failure hides no other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import Any

from apps.cli import console
from edge.errors import EdgeError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="also look at this bundle")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU; default 0")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(args: argparse.Namespace) -> int:
    from edge import open_bundle

    document = examine(args.device)
    if args.bundle:
        bundle = open_bundle(args.bundle)  # what is wrong with it is this command's own error
        document["bundle"] = {"path": str(bundle.path), "needs": bundle_needs(bundle.manifest, document["gpu"])}
    file = console.report_stream(args.json)
    for title, facts in document.items():
        rows = [(name.replace("_", " "), _shown(value)) for name, value in facts.items()]
        console.facts(title.replace("_", " "), rows, file)
    if args.json:
        console.print_json(document)
    return 0


def examine(device: int = 0) -> dict[str, dict[str, Any]]:
    """Everything that is looked at, as JSON values."""
    gpu = _gpu(device)
    return {
        "machine": _machine(),
        "gpu": gpu,
        "onnxruntime": _onnxruntime(),
        "tensorrt": _tensorrt(),
        "backends": {"cpu": _verdict_cpu(), "cuda": _verdict_cuda(gpu), "tensorrt": _verdict_tensorrt(gpu)},
    }


def bundle_needs(manifest: Any, gpu: dict[str, Any]) -> dict[str, Any]:
    """What a bundle takes before any window, beside what is free."""
    from edge.backends.cuda import weights_bytes, workspace_bytes
    from edge.memory import available_bytes

    return {
        "weights_bytes": manifest.vision.weights_bytes + manifest.decoder.weights_bytes,
        "memory_free_bytes": available_bytes(),
        "on_gpu_bytes": weights_bytes(manifest) + workspace_bytes(manifest),
        "gpu_free_bytes": gpu.get("memory_free_bytes"),
        "kv_bytes_per_token": manifest.kv_bytes_per_token,
        "stored_turns": bool(manifest.stored_turns),
    }


def _machine() -> dict[str, Any]:
    from edge import __version__, native
    from edge.memory import available_bytes

    missing = native.available()
    return {
        "streamo_edge": __version__,
        "python": f"{platform.python_version()} ({platform.machine()}, {platform.system()} {platform.release()})",
        "jetson": _first_line(Path("/etc/nv_tegra_release")),
        "memory_free_bytes": available_bytes(),
        "native_kernels": missing or native.instruction_set(),
    }


def _gpu(device: int) -> dict[str, Any]:
    """The driver's view of the GPU, and which machine code there is for it."""
    from edge.gpu import Gpu
    from edge.gpu_abi import cubin_folder

    archives = sorted(path.stem.removeprefix("sm_") for path in cubin_folder().glob("sm_*.cubins"))
    found: dict[str, Any] = {"kernels_for_sm": archives, "kernels_folder": str(cubin_folder())}
    try:
        with Gpu(device) as gpu:
            facts = gpu.facts
    except EdgeError as error:
        return {"usable": False, "reason": error.message, "hint": error.hint, **found}
    return {
        "usable": True,
        "name": facts.name,
        "sm": facts.sm,
        "kernel_sm": facts.kernel_sm,
        "multiprocessors": facts.multiprocessors,
        "driver_supports_cuda": facts.driver_version,
        "shares_memory_with_cpu": facts.integrated,
        "memory_bytes": facts.memory_bytes,
        "memory_free_bytes": facts.free_bytes,
        **found,
    }


def _onnxruntime() -> dict[str, Any]:
    from edge.backends.ort_session import onnxruntime_module

    try:
        runtime = onnxruntime_module()
    except EdgeError as error:
        return {"reason": error.message, "hint": error.hint}
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version_of(name)]
    found = {"version": runtime.__version__, "packages": both, "providers": list(runtime.get_available_providers())}
    if len(both) > 1:
        found["hint"] = "Both packages fill the same folder; uninstall both, then install one"
    return found


def _tensorrt() -> dict[str, Any]:
    if importlib.util.find_spec("tensorrt") is None:
        return {"version": None, "reason": f"not installed for {sys.executable}"}
    return {"version": _version_of("tensorrt") or "unknown"}


def _verdict_cpu() -> str:
    from edge.backends.ort_session import onnxruntime_module

    try:
        onnxruntime_module()
    except EdgeError as error:
        return _sentence(error)
    return "usable"


def _verdict_cuda(gpu: dict[str, Any]) -> str:
    from edge.backends.cuda_provider import check_provider

    if not gpu["usable"]:
        return "not usable: no GPU, see above"
    try:
        check_provider()
    except EdgeError as error:
        return _sentence(error)
    return "usable"


def _verdict_tensorrt(gpu: dict[str, Any]) -> str:
    from edge.engines.plugin import find_plugin
    from edge.engines.toolkit import load_tensorrt

    if not gpu["usable"]:
        return "not usable: no GPU, see above"
    try:
        find_plugin(load_tensorrt())
    except EdgeError as error:
        return _sentence(error)
    return "usable"


def _sentence(error: EdgeError) -> str:
    return f"not usable: {error.message}" + (f"; {error.hint}" if error.hint else "")


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_shown(item)}" for name, item in value.items())
    return console.bytes_text(value) if isinstance(value, int) and value > 1 << 20 else str(value)

"""The shape of the code: who may import whom, how long files and functions get, and no path of any one machine."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("edge", "export", "apps")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

EDGE_NEVER = {"torch", "transformers", "onnx", "export", "apps", "safetensors", "matplotlib", "rich"}
EDGE_AT_IMPORT = {"numpy", "edge"}
EXPORT_MAY_SEE = {
    "edge.contract",
    "edge.preprocess",
    "edge.prompt",
    "edge.rope",
    "edge.errors",
    "edge.stored_turns",  # the file that the export writes and a first run reads
    "edge.native",  # where our operators are, to prove the native graphs with them
}
PURE_MODULES = ("session.py", "decoder.py", "kv_cache.py", "pacing.py")
PURE_NEVER = {"time", "threading", "cv2", "onnxruntime", "socket", "subprocess", "asyncio"}
MAY_USE_THREADS = {
    "edge/feed.py": "plays the source while the model works",
    "edge/viewers.py": "heavy outputs must not hold up a turn",
    "edge/sources/camera.py": "OpenCV may block for as long as it likes",
    "edge/frames.py": "the mailbox between a camera's thread and its reader",
    "edge/runtime.py": "takes a `threading.Event` that ends a run; starts no thread",
}


def files_of(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path, *, everywhere: bool) -> set[str]:
    """Full names of imported modules; with `everywhere=False` only those that run when the module is imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not everywhere and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(other)
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.update(_from_names(child, path))
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def _from_names(node: ast.ImportFrom, path: Path) -> set[str]:
    module = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).parent.parts
        base = package[: len(package) - node.level + 1]
        module = ".".join([*base, module]) if module else ".".join(base)
    if module in PACKAGES:  # `from edge import contract`
        return {f"{module}.{alias.name}" for alias in node.names}
    return {module}


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def offenders(paths: list[Path], wrong: Callable[[Path], object]) -> dict[str, object]:
    """What is wrong, by file; files with nothing wrong are left out."""
    assert paths
    found = {name_of(path): wrong(path) for path in paths}
    return {name: what for name, what in found.items() if what}


def test_the_runtime_never_imports_training_export_or_app_code():
    assert not offenders(files_of("edge"), lambda path: tops(imports_of(path, everywhere=True)) & EDGE_NEVER)


def test_importing_a_runtime_module_needs_numpy_and_the_standard_library_only():
    light = set(sys.stdlib_module_names) | EDGE_AT_IMPORT
    assert not offenders(files_of("edge"), lambda path: tops(imports_of(path, everywhere=False)) - light)


def test_export_sees_only_what_both_sides_must_agree_on():
    def wrong(path: Path) -> set[str]:
        names = imports_of(path, everywhere=True)
        return {name for name in names if name.partition(".")[0] in ("edge", "apps")} - EXPORT_MAY_SEE

    assert not offenders(files_of("export"), wrong)


def test_the_stream_logic_uses_no_io_no_threads_and_no_wall_clock():
    paths = [ROOT / "edge" / name for name in PURE_MODULES]
    assert not offenders(paths, lambda path: tops(imports_of(path, everywhere=True)) & PURE_NEVER)


def test_threads_live_in_few_files():
    paths = [path for path in files_of("edge") if name_of(path) not in MAY_USE_THREADS]
    threads = {"threading", "concurrent", "multiprocessing", "queue"}
    assert not offenders(paths, lambda path: tops(imports_of(path, everywhere=True)) & threads)


def test_files_stay_short():
    def too_long(path: Path) -> int:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        return lines if lines > MAX_FILE_LINES else 0

    assert not offenders(files_of(*PACKAGES, "tests"), too_long)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    described = ast.get_docstring(function) is not None
    docstring_lines = first.end_lineno - first.lineno + 1 if described else 0
    return function.end_lineno - function.lineno + 1 - docstring_lines


def test_functions_fit_a_screen():
    def too_long(path: Path) -> dict[str, int]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        lengths = {function.name: code_lines(function) for function in functions}
        return {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}

    assert not offenders(files_of(*PACKAGES), too_long)


def test_every_module_says_what_it_owns():
    def silent(path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        return bool(text.strip()) and not ast.get_docstring(ast.parse(text))

    assert not offenders(files_of(*PACKAGES), silent)


def test_no_file_names_a_place_of_one_machine():
    home = re.compile(r"/(?:home|root|opt|work|Users)/\w+")
    paths = [*files_of(*PACKAGES, "tests"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "quickstart"]
    assert not offenders(paths, lambda path: home.findall(path.read_text(encoding="utf-8")))

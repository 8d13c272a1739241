"""The native kernels' library: built without a warning, exporting nothing else, found and chosen as documented."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import needs_kernels

from edge import kernels_abi, native
from edge.errors import BackendError, KernelError

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "kernels" / "include" / "streamo_kernels.h"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def python(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    run = [sys.executable, "-c", code]
    return subprocess.run(
        run, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout.strip()


@needs("gcc")
def test_the_header_is_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "one.c"
    source.write_text('#include "streamo_kernels.h"\nint version(void) { return streamo_abi_version(); }\n')
    flags = ["-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}"]
    subprocess.run(["gcc", *flags, "-c", str(source), "-o", str(tmp_path / "one.o")], check=True)


def test_the_binding_has_the_headers_version_and_functions() -> None:
    text = HEADER.read_text(encoding="utf-8")
    assert f"#define STREAMO_KERNELS_ABI {kernels_abi.ABI_VERSION}\n" in text
    declared = set(re.findall(r"STREAMO_API [^;(]*?(streamo_\w+)\(", text))
    assert set(kernels_abi._SIGNATURES) <= declared


@needs("gcc")
def test_the_bindings_structs_lie_as_in_c(tmp_path: Path) -> None:
    import ctypes

    structs = {
        "streamo_attention": kernels_abi.AttentionArguments,
        "streamo_window_attention": kernels_abi.WindowAttentionArguments,
        "streamo_weights_source": kernels_abi.WeightsSource,
        "streamo_matmul": kernels_abi.MatmulArguments,
    }
    lines, expected = [], []
    for name, struct in structs.items():
        for field, *_ in struct._fields_:
            lines.append(f'printf("%d ", (int)offsetof({name}, {field}));')
            expected.append(getattr(struct, field).offset)
        lines.append(f'printf("%d ", (int)sizeof({name}));')
        expected.append(ctypes.sizeof(struct))
    source = tmp_path / "layout.c"
    source.write_text('#include <stdio.h>\n#include "streamo_kernels.h"\nint main(void) {' + "\n".join(lines) + "}")
    subprocess.run(["gcc", f"-I{HEADER.parent}", str(source), "-o", str(tmp_path / "layout")], check=True)
    printed = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    assert [int(number) for number in printed.split()] == expected


@needs_kernels
@needs("nm")
def test_the_library_exports_the_interface_and_nothing_else() -> None:
    run = ["nm", "-D", "--defined-only", str(native.library_path())]
    names = {line.split()[-1] for line in subprocess.run(run, capture_output=True, text=True).stdout.splitlines()}
    assert {*kernels_abi._SIGNATURES, "RegisterCustomOps"} <= names
    assert {name for name in names if not name.startswith("streamo_")} == {"RegisterCustomOps"}


@pytest.mark.slow
@needs("cmake")
@needs("g++")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DSTREAMO_WERROR=ON"]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", str(os.cpu_count())]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "warning:" not in result.stdout + result.stderr


@pytest.mark.slow
@needs("cmake")
@needs("aarch64-linux-gnu-g++")
def test_it_builds_for_arm_without_a_warning(tmp_path: Path) -> None:
    toolchain = ROOT / "kernels" / "cmake" / "aarch64-linux-gnu.cmake"
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"]
    subprocess.run([*configure, "-DSTREAMO_WERROR=ON"], check=True, capture_output=True)
    build = ["cmake", "--build", str(tmp_path), "--parallel", str(os.cpu_count())]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@needs("cmake")
def test_without_a_compiler_the_install_goes_on_and_says_what_is_lacking(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel")
    lib, temp = tmp_path / "lib", tmp_path / "temp"
    run = [sys.executable, "setup.py", "build_ext", "--build-lib", str(lib), "--build-temp", str(temp)]
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "CC": str(tmp_path / "none")}
    environment.pop("STREAMO_EDGE_REQUIRE_KERNELS", None)
    result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "WARNING: The native kernels of streamo-edge were not built" in result.stderr
    assert "apt install g++" in result.stderr
    assert not list(lib.rglob("*.so"))
    required = {**environment, "STREAMO_EDGE_REQUIRE_KERNELS": "1"}
    failed = subprocess.run(run, cwd=ROOT, env=required, capture_output=True, text=True)
    assert failed.returncode != 0


SAY = "from edge import native; print(native.available())"


def test_an_absent_library_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "was not built when" in python(SAY, STREAMO_EDGE_KERNELS=str(tmp_path / "absent.so"))
    assert "do not load" in python(SAY, STREAMO_EDGE_KERNELS=str(broken))
    assert "switched off" in python(SAY, STREAMO_EDGE_KERNELS="off")
    code = "from edge import native\ntry: native.instruction_set()\nexcept native.BackendError as e: print(e.hint)"
    assert "C++ compiler" in python(code, STREAMO_EDGE_KERNELS=str(tmp_path / "absent.so"))


@needs_kernels
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from edge import native; print(native.instruction_set())"
    assert python(code, STREAMO_EDGE_INSTRUCTION_SET="portable") == "portable"
    assert python(code, STREAMO_EDGE_INSTRUCTION_SET="") == python(code)
    reason = python(SAY, STREAMO_EDGE_INSTRUCTION_SET="mmx")
    assert reason.startswith("STREAMO_EDGE_INSTRUCTION_SET is `mmx`") and "expected avx512vnni" in reason


@needs_kernels
def test_another_instruction_set_is_used_until_the_best_is_asked_for_again() -> None:
    best = native.instruction_set()
    try:
        assert native.instruction_set_available("portable")
        native.select_instruction_set("portable")
        assert native.instruction_set() == "portable"
        absent = next(name for name in ("i8mm", "avx2") if not native.instruction_set_available(name))
        with pytest.raises(KernelError, match=f"this CPU does not have {absent}"):
            native.select_instruction_set(absent)
        assert native.instruction_set() == "portable"
    finally:
        native.select_instruction_set(None)
    assert native.instruction_set() == best


@needs_kernels
def test_threads_are_refused_in_words() -> None:
    with pytest.raises(KernelError, match="expected at least 1, found 0"):
        native.Threads(0)
    with pytest.raises(BackendError, match="expected 1 to 1024, found 5000"):
        native.Threads(5000)
    threads = native.Threads(3)
    threads.close()
    threads.close()

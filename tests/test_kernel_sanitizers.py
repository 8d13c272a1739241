"""The kernels' tests again with a library that checks every address, every thread's access and undefined behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("test_attention_kernels.py", "test_matmul_kernels.py", "test_window_attention_kernels.py",
         "test_kernel_refusals.py", "test_gpu_launcher.py")  # fmt: skip
OTHER_LIBRARIES = "not stock and not torch and not any_layout and not any_size and not another_process"
"""Left out: what runs inside libraries that know nothing of sanitizers, and drawn cases, which would take minutes."""
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
}

pytestmark = pytest.mark.slow


def runtime_library(name: str) -> Path:
    """The sanitizer's own library, which has to be loaded before Python."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("g++ and cmake are needed to build with sanitizers, and are not both installed")
    found = Path(subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip())
    if not found.is_absolute():
        pytest.skip(f"g++ comes without {name}")
    return found.resolve()


def build(folder: Path, sanitizers: str) -> Path:
    """The library, built with sanitizers."""
    options = [f"-DSTREAMO_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_COMPILER=g++"]
    for command in (["cmake", "-S", ROOT, "-B", folder, *options], ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return next(folder.rglob("libstreamo_kernels.so"))


def run_tests(library: Path, runtime: Path, selection: str) -> str:
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": str(runtime), "STREAMO_EDGE_KERNELS": str(library)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", selection,
               *(str(ROOT / "tests" / name) for name in FILES)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    output = done.stdout[-2000:] + done.stderr[:4000]  # the stack's innermost end comes first
    assert done.returncode == 0, output
    return output


def test_no_address_is_wrong_and_no_behaviour_undefined(tmp_path: Path):
    runtime = runtime_library("libasan.so")
    output = run_tests(build(tmp_path, "address,undefined"), runtime, OTHER_LIBRARIES)
    assert " passed" in output and "runtime error" not in output


def test_threads_never_touch_the_same_memory_unordered(tmp_path: Path):
    runtime = runtime_library("libtsan.so")
    output = run_tests(build(tmp_path, "thread"), runtime, "number_of_threads or launch_at_the_same_time")
    assert " passed" in output and "data race" not in output


def test_no_memory_stays_behind_when_gpus_are_opened_refused_used_and_closed(tmp_path: Path):
    """A program of its own: the leak checker would find Python's too."""
    from gpu_interpreter import ROOT as root
    from gpu_interpreter import FakeCuda, kernel_file

    chosen = kernel_file(root / "tests" / "gpu_probe_kernels.py").variants()
    cuda = FakeCuda(tmp_path, chosen=chosen)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "sm_87.cubins").write_bytes((cuda.cubins / "sm_87.cubins").read_bytes()[:-40])
    library = build(tmp_path / "build", "address,undefined")
    program = tmp_path / "check_gpu"
    source = root / "kernels" / "tests" / "check_gpu.c"
    line = ["gcc", "-g", "-fsanitize=address,undefined", f"-I{root / 'kernels' / 'include'}", source, library,
            f"-Wl,-rpath,{library.parent}", "-o", program]  # fmt: skip
    subprocess.run(list(map(str, line)), check=True)
    options = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    environment = {**os.environ, **options, "STREAMO_CUDA_DRIVER": str(cuda.library_path)}
    run = [str(program), str(cuda.cubins), str(damaged)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "opened 50 times" in done.stdout, done.stdout + done.stderr[:4000]

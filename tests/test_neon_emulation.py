"""The NEON kernels under emulation: a C++ driver, cross-compiled, runs the common table of cases on an emulated CPU.

Proves results, not speed: an emulator's times say nothing about a CPU's.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from apps.bench.kernel_cases import AttentionCase, MatmulCase, attention_cases, matmul_cases

ROOT = Path(__file__).resolve().parent.parent
TOOLCHAIN = ROOT / "kernels" / "cmake" / "aarch64-linux-gnu.cmake"
CROSS_LIBRARIES = Path("/usr/aarch64-linux-gnu")
"""Where Debian and Ubuntu keep the C library of the emulated architecture."""
INSTALL = "apt-get install cmake g++-aarch64-linux-gnu qemu-user-static"
NEEDED = ("cmake", "make", "aarch64-linux-gnu-g++", "qemu-aarch64-static")

CPUS = {"cortex-a76": ["dotprod", "portable"], "max": ["i8mm", "dotprod", "portable"]}
"""Emulated CPUs, and the instruction sets that each must have."""
WINDOWS = [(16, 80, "64,64,32,3"), (2, 64, "65,1"), (3, 16, "16,8,0,16"), (1, 128, "130")]
"""Heads, head width and rows of each window."""
QUICK_WORK = 4_000_000
"""Multiply-adds of the largest case of the quick runs: the emulator, and the oracle in it, manage few a second."""


def attention_line(case: AttentionCase) -> str:
    pieces = ",".join(f"{piece.length}:{piece.run}:{piece.gap}" for piece in case.pieces)
    return (
        f"attention query_heads={case.query_heads} kv_heads={case.kv_heads} head_dim={case.head_dim} "
        f"new_tokens={case.new_tokens} kv={case.kv} bias={case.bias:d} key_bias={case.key_bias} "
        f"offset={case.offset:d} first_position={case.first_position} spare_rows={case.spare_rows} "
        f"shifts={','.join(map(str, case.shifts))} pieces={pieces} | {case.name}"
    )


def matmul_line(case: MatmulCase, padding: int) -> str:
    return (
        f"matmul inputs={case.inputs} outputs={case.outputs} rows={case.rows} bits={case.bits} block={case.block} "
        f"gated={case.gated:d} bias={case.bias:d} residual={case.residual:d} padding={padding} "
        f"| {case.name}, {padding} between rows"
    )


def window_line(heads: int, width: int, windows: str) -> str:
    return f"window heads={heads} head_dim={width} windows={windows} | windows {windows}, heads {heads} of {width}"


def attention_work(case: AttentionCase) -> int:
    return case.query_heads * case.head_dim * case.new_tokens * (case.depth + case.new_tokens) * 2


def matmul_work(case: MatmulCase) -> int:
    return case.inputs * case.outputs * case.rows


def short_blocks() -> list[MatmulCase]:
    """Products whose last block is short, which the common table has none of."""
    sizes = ((100, 32), (31, 32), (1, 16), (588, 128))
    return [MatmulCase(inputs, 36, rows, bits, block) for inputs, block in sizes for rows in (1, 11) for bits in (4, 8)]


def case_lines(most_work: int | None) -> list[str]:
    """Every case, or those of at most so many multiply-adds."""

    def small(work: int) -> bool:
        return most_work is None or work <= most_work

    attention = [attention_line(case) for case in attention_cases() if small(attention_work(case))]
    products = [case for case in matmul_cases() + short_blocks() if small(matmul_work(case))]
    return [
        *attention,
        *(matmul_line(case, 3 * (index % 2)) for index, case in enumerate(products)),
        *(window_line(*window) for window in WINDOWS),
    ]


def run(command: list[str], lines: Iterable[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)


def build(folder: Path, *options: str) -> Path:
    """The driver, with the library beside it."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DSTREAMO_BUILD_TESTS=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--target", "check_kernels", "--parallel", "2"]):
        done = run(command)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return next(path for path in folder.rglob("check_kernels") if path.is_file())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """check_kernels for 64-bit Arm."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or not CROSS_LIBRARIES.is_dir():
        pytest.skip(f"{', '.join(missing) or CROSS_LIBRARIES} not found; {INSTALL}")
    return build(tmp_path_factory.mktemp("aarch64"), f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}")


def emulated(driver: Path, cpu: str, sets: list[str]) -> list[str]:
    return ["qemu-aarch64-static", "-L", str(CROSS_LIBRARIES), "-cpu", cpu, str(driver), *sets]


def expect_all_to_agree(done: subprocess.CompletedProcess[str], cases: int, sets: list[str]) -> None:
    summary = f"{cases} cases, 0 failed, with {' '.join(sets)}\n"
    assert done.returncode == 0 and done.stdout.endswith(summary), (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize("cpu", CPUS)
def test_neon_gives_what_the_oracle_gives_on_small_cases(driver: Path, cpu: str):
    lines = case_lines(QUICK_WORK)
    expect_all_to_agree(run(emulated(driver, cpu, CPUS[cpu]), lines), len(lines), CPUS[cpu])


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_neon_gives_what_the_oracle_gives_on_every_case(driver: Path, cpu: str):
    lines = case_lines(None)
    expect_all_to_agree(run(emulated(driver, cpu, CPUS[cpu]), lines), len(lines), CPUS[cpu])


def test_an_instruction_set_that_the_cpu_lacks_is_refused(driver: Path):
    """Else the test of a lesser CPU might have run a greater one's kernels."""
    done = run(emulated(driver, "cortex-a76", ["i8mm"]), case_lines(1000))
    assert done.returncode == 2 and "expected a CPU with i8mm, found one with at best dotprod" in done.stderr


def test_without_an_extension_the_portable_kernels_run(driver: Path):
    lines = case_lines(100_000)
    expect_all_to_agree(run(emulated(driver, "cortex-a53", []), lines), len(lines), ["portable"])

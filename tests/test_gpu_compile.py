"""GPU kernels compiled ahead of time, for generations that nobody here has: the machine code and its files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_interpreter import ROOT, gpu_module, needs_triton, variants

pytestmark = needs_triton

COMMAND = ROOT / "kernels" / "gpu" / "compile.py"
PROBE = ROOT / "tests" / "gpu_probe_kernels.py"
ALL = {80, 86, 87, 89, 90, 100, 103, 110, 120, 121}


def compile_kernels(*options: object, command: Path = COMMAND, cache: Path | None = None) -> dict[str, Any]:
    """What the command says of the kernels it compiled."""
    done = run(*options, "--json", command=command, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def run(*options: object, command: Path = COMMAND, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    line = [sys.executable, str(command), *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def assert_usable(document: dict[str, Any], names: set[str], generations: set[int]) -> None:
    """Every kernel for every generation, nothing kept in local memory."""
    found = {(kernel["name"], kernel["sm"]) for kernel in document["kernels"]}
    assert found == {(name, sm) for name in names for sm in generations}
    spilling = {(kernel["name"], kernel["sm"]): kernel["spill_bytes"] for kernel in document["kernels"]}
    assert not {key: spilled for key, spilled in spilling.items() if spilled}


def test_every_kernel_compiles_for_every_generation_without_spills(tmp_path: Path):
    document = compile_kernels("-o", tmp_path)
    assert_usable(document, set(variants()), ALL)
    # Tensor cores wait without a second program on the multiprocessor: 2 x 256 threads x 128 registers are all it has.
    turns = {f"product_rows_{form}_k32_m64" for form in ("w4a16", "w8a8")}
    found = [one for one in document["kernels"] if one["name"] in turns]
    assert len(found) == len(turns) * len(ALL)
    assert not [(one["name"], one["sm"]) for one in found if one["registers"] > 128]


def test_the_same_kernels_give_the_same_bytes_in_any_folder(tmp_path: Path):
    first, second = tmp_path / "one", tmp_path / "another folder"
    for folder in (first, second):
        (folder / "gpu").mkdir(parents=True)
        for path in COMMAND.parent.glob("*.py"):
            (folder / "gpu" / path.name).write_bytes(path.read_bytes())
        (folder / PROBE.name).write_bytes(PROBE.read_bytes())
        options = ("--kernels", folder / PROBE.name, "--sm", "80,110", "-o", folder / "out", "--jobs", 1)
        compile_kernels(*options, command=folder / "gpu" / "compile.py", cache=folder / "cache")
    for sm in (80, 110):
        data = (first / "out" / f"sm_{sm}.cubins").read_bytes()
        assert data == (second / "out" / f"sm_{sm}.cubins").read_bytes()
        places = re.findall(rb"/\w+/\w+|\.py", data)
        assert not places, f"the machine code names places of the machine that made it: {places[:3]}"


def test_the_archive_says_which_driver_it_needs(tmp_path: Path):
    compile_kernels("--kernels", PROBE, "--sm", "90,110,120", "-o", tmp_path)
    versions = {
        sm: int.from_bytes((tmp_path / f"sm_{sm}.cubins").read_bytes()[16:20], "little") // 1000
        for sm in (90, 110, 120)
    }
    assert versions == {90: 12, 110: 13, 120: 12}  # CUDA 12 has no Thor under this number


def test_a_kernel_that_spills_is_said_with_its_bytes(tmp_path: Path):
    module = tmp_path / "spilling.py"
    module.write_text(PROBE.read_text(encoding="utf-8").replace("def spilling_variants", "def variants"))
    done = run("--kernels", module, "--sm", "87", "-o", tmp_path, "--json")
    assert done.returncode == 0
    (kernel,) = json.loads(done.stdout)["kernels"]
    assert kernel["spill_bytes"] > 0
    assert f"`spilling` for sm_87 keeps {kernel['spill_bytes']} bytes a thread in local memory" in done.stderr


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path):
    broken = PROBE.read_text(encoding="utf-8").replace("tl.store(out", "tl.stoer(out")
    (tmp_path / "broken.py").write_text(broken)
    done = run("--kernels", tmp_path / "broken.py", "--sm", "87", "-o", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: `racing_64` for sm_87: " in done.stderr and "`scaled_sum_64` for sm_87: " in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["87,abc", "61", ""])
def test_a_generation_that_is_not_known_is_refused(wrong: str):
    done = run("--sm", wrong)
    assert done.returncode == 2 and "--sm: expected" in done.stderr


def test_the_report_has_every_kernel_and_says_that_it_predicts(tmp_path: Path):
    done = run("--kernels", PROBE, "--sm", "87,90", "--report", tmp_path / "report.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Nothing on this page was measured" in text and "times are predictions" in text
    for name in ("scaled_sum_64", "without_mask_64"):
        assert re.search(rf"\| `{name}` \| \d \| \d+ / 0 / \d+% \| \d+ / 0 / \d+% \|", text)
    orin = next(line for line in text.splitlines() if "one million numbers" in line)
    assert "| 9.00 |" in orin and "(memory)" in orin


def test_occupancy_is_what_the_limits_leave():
    report, archive = gpu_module("report"), gpu_module("archive")

    def blocks(sm: int, **changes: int) -> tuple[int, float]:
        fields = {"num_warps": 4, "shared_bytes": 0, "registers": 32, **changes}
        return report.occupancy(archive.ArchivedKernel("a", "a", "", spill_bytes=0, cubin=b"", **fields), sm)

    assert blocks(90) == (16, 1.0)  # 64 warps
    assert blocks(87) == (12, 1.0)  # 48 warps
    assert blocks(90, num_warps=1) == (32, 0.5)  # blocks
    assert blocks(90, registers=255) == (2, 0.125)  # 255 -> 8192 registers a warp, 8 warps
    assert blocks(87, registers=168) == (3, 0.25)  # 168 -> 5376 a warp, 12 warps
    assert blocks(90, shared_bytes=100 << 10) == (2, 0.125)
    assert blocks(86, shared_bytes=60 << 10) == (1, 4 / 48)


def test_predictions_follow_the_roofline():
    report, variant = gpu_module("report"), gpu_module("variant")
    orin = next(device for device in report.DEVICES if device.bandwidth_gbps == 204.8)
    time_us, bound = report.predicted_us(variant.Work("a", "a", 204_800_000, int8_tensor_ops=1_000_000), orin)
    assert bound == "memory" and time_us == pytest.approx(1000 + report.LAUNCH_US)
    time_us, bound = report.predicted_us(variant.Work("a", "a", 1, int8_tensor_ops=85_000_000_000), orin)
    assert bound == "tensor cores" and time_us == pytest.approx(1000 + report.LAUNCH_US)


def test_facts_of_the_machine_code_are_what_the_toolkit_reads_in_it(tmp_path: Path):
    """cuobjdump comes with Triton."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("cuobjdump is not there")
    module = tmp_path / "both.py"
    text = PROBE.read_text(encoding="utf-8").replace(
        "    return [\n", "    return [\n        *spilling_variants(),\n", 1
    )
    module.write_text(text)
    compile_kernels("--kernels", module, "--sm", "80,100", "-o", tmp_path)
    for sm in (80, 100):
        data = (tmp_path / f"sm_{sm}.cubins").read_bytes()
        starts = [match.start() for match in re.finditer(rb"\x7fELF", data)]
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
            cubin = data[start:end]
            (tmp_path / "one.cubin").write_bytes(cubin)
            said = subprocess.run(
                [tool, "--dump-resource-usage", tmp_path / "one.cubin"], capture_output=True, text=True
            )
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()
            facts = gpu_module("cubin").cubin_facts(cubin)
            assert (facts.registers, facts.local_bytes) == (int(registers), int(stack))
            said = subprocess.run([tool, "--dump-elf", tmp_path / "one.cubin"], capture_output=True, text=True)
            threads = re.search(r"EIATTR_REQNTID\s+Format:\s+\S+\s+Value:\s+(\S+) (\S+) (\S+)", said.stdout).groups()
            assert facts.threads == tuple(int(count, 16) for count in threads)
            said_bytes = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x\w+\s+Size\s+: 0x(\w+)", said.stdout)
            sizes = dict((int(ordinal, 16), int(size, 16)) for ordinal, size in said_bytes)
            assert facts.parameter_bytes == tuple(sizes[index] for index in range(len(sizes)))


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", b"FAKECUBIN" * 20])
def test_what_is_no_machine_code_is_refused(data: bytes):
    import struct

    with pytest.raises((ValueError, struct.error)):
        gpu_module("cubin").cubin_facts(data)


def test_a_step_reads_every_weight_and_every_cached_row_once():
    steps, report = gpu_module("steps"), gpu_module("report")
    three = steps.SHAPES[0]
    assert three.layer_weights == 2048 * (16 + 2 + 2 + 16) * 128 + 3 * 2048 * 11008
    step = steps.step_of(three, 1, 4096)
    weights = 36 * three.layer_weights
    cache = 36 * 4097 * 2 * 2 * 132
    assert step.bytes_moved == weights // 2 + weights // 8 + cache + 151_936 * 2048 * 9 // 8
    orin = next(device for device in report.DEVICES if device.bandwidth_gbps == 204.8)
    launches_ms = step.launches * report.GRAPH_LAUNCH_US / 1e3
    assert report.predicted_step_ms(step, orin) == pytest.approx(step.bytes_moved / 204.8e6 + launches_ms)

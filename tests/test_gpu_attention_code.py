"""The machine code of attention: that it is what the kernels' comments say, for devices that nobody here has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_interpreter import ROOT, needs_triton

pytestmark = needs_triton

COMPILE = """
import sys
sys.path.insert(0, sys.argv[1])
import load
build = load.gpu_module("build")
build.table_in_process(None)
kernel, _ = build.compile_kernel(build.Task(sys.argv[2], int(sys.argv[3]), None))
open(sys.argv[4], "wb").write(kernel.cubin)
import triton
print(triton.knobs.nvidia.nvdisasm.path)
"""


def instructions(name: str, sm: int, folder: Path) -> list[str]:
    """The mnemonics of a kernel's machine code."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    cubin = folder / "kernel.cubin"
    line = [sys.executable, "-W", "ignore", "-c", COMPILE, ROOT / "kernels" / "gpu", name, sm, cubin]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    disassembler = done.stdout.splitlines()[-1]
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]*)", text)


def test_what_is_cached_is_never_rounded_once_for_a_product_and_a_sum(tmp_path: Path):
    """The CPU kernels round both; a fused one would change codes in their last bit."""
    found = instructions("append_f32_d64_t1", 87, tmp_path)
    assert "FMUL" in found and "FADD" in found
    assert not [name for name in found if name.startswith("FFMA")]


@pytest.mark.parametrize("name", ["attend_int8_d64_m16", "attend_int8_d128_m16"])
def test_a_decode_step_multiplies_codes_on_tensor_cores_and_streams_the_cache(name: str, tmp_path: Path):
    found = instructions(name, 87, tmp_path)
    assert any(one.startswith("IMMA.16832.S8.S8") for one in found), "queries times keys in 8 bits"
    assert any(one.startswith("HMMA.16816.F32") for one in found), "weights times values, sums in float32"
    assert any(one.startswith("LDGSTS") and one.endswith("128") for one in found), "copies past the registers"
    assert not [one for one in found if one.startswith(("LDL", "STL"))], "registers in local memory"
    assert not [one for one in found if one.startswith(("LDS.S8", "LDS.U8", "I2F.F16"))], "codes converted one by one"


@pytest.mark.slow
def test_an_append_on_hopper_uses_its_large_products(tmp_path: Path):
    found = instructions("attend_int8_d128_m128", 90, tmp_path)
    assert any(re.match(r"IGMMA\.64x\d+x32\.S8\.S8", one) for one in found)
    assert any(one.startswith("HGMMA.64x") for one in found)

"""Nothing on the host touches device memory: on a real device that would end the process, on a pretended one it works.

Here the pretended driver hides its memory, so that the process ends as well. In a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

pytestmark = [needs_kernels, needs_triton, needs_compiler]

HERE = Path(__file__).resolve().parent
EVERY_OPERATION = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from gpu_interpreter import FakeCuda
from apps.bench.gpu_turn import SMALL, _Turn
import numpy as np
from edge import gpu_operations as operations
with FakeCuda(Path({folder!r}), hidden=1).open() as gpu:
    turn = _Turn(gpu, SMALL)  # norms, products, windows, attention by a table, the choice of a token
    logits = turn.run(None)
    operations.sample(gpu, logits, temperature=0.7, top_k=9, top_p=0.9, random=0.3)
    frame = gpu.array(np.zeros((30, 40, 3), np.uint8))
    operations.patches_of_frame(
        gpu, frame, new_size=(28, 28), patch=14, merge=2, mean=(0.5,) * 3, deviation=(0.5,) * 3
    )
    assert np.isfinite(gpu.numpy(logits)).all()
    print("done", flush=True)
    {then}
"""


@pytest.mark.parametrize("then", ["pass", "(ctypes.c_byte * 4).from_address(frame.pointer)[0]"])
def test_only_copies_and_kernels_touch_device_memory(tmp_path: Path, then: str):
    program = "import ctypes\n" + EVERY_OPERATION.format(
        tests=str(HERE), root=str(HERE.parent), folder=str(tmp_path), then=then
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["done"], done.stderr[-3000:]
    touches = then != "pass"
    assert (done.returncode < 0) == touches, "the memory was not hidden" if touches else done.stderr[-3000:]


def test_hidden_memory_is_ordinary_memory_otherwise(tmp_path: Path):
    import numpy as np

    with FakeCuda(tmp_path, hidden=1).open() as gpu:
        values = np.arange(5000, dtype=np.int32)
        np.testing.assert_array_equal(gpu.numpy(gpu.array(values)), values)

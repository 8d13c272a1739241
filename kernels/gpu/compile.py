"""Compiles the GPU kernels to machine code: one archive for each GPU generation. Needs Triton, and no GPU.

    python kernels/gpu/compile.py                               all kernels for all generations, into edge/cubins
    python kernels/gpu/compile.py --sm 87,110 --only attend     some of them, to see whether they compile
    python kernels/gpu/compile.py --report docs/gpu-kernels.md  the table of registers, occupancy and predicted times

stdout: with `--json` one JSON document, else nothing; stderr: progress and warnings. Exit code 1: a kernel does not
compile, or cannot be launched on a generation. The same kernels and the same Triton give the same bytes, whatever the
folder.
"""

from __future__ import annotations

import sys

from load import gpu_module

# Above the guard: the processes that compile start here too, and find `build` by the folder's name.
build = gpu_module("build")

if __name__ == "__main__":
    sys.exit(build.main())

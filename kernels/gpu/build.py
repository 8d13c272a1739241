"""Triton's functions to archives of machine code, for every kernel and GPU generation.

Owns the compilation, its processes and the command line of `compile.py`. Knows neither the archive's format nor what
the figures mean.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .archive import ArchivedKernel, archive_bytes, archive_name
from .cubin import cubin_facts
from .load import gpu_module, kernel_file
from .report import LIMITS, report

GENERATIONS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
FOLDER = Path(__file__).resolve().parents[2] / "edge" / "cubins"

NEWEST_OF_CUDA_12 = 121
"""The assembler of CUDA 12 makes code up to this capability that drivers of CUDA 12 load too..."""
ONLY_CUDA_13 = (110,)
"""... but these it does not know."""

HIDDEN_PARAMETERS = 2  # pointers to scratch memory that Triton adds at the end
LETTER_BYTES = {"p": 8, "i": 4, "l": 8, "f": 4}


@dataclass(frozen=True)
class Task:
    """One kernel for one generation. `file`: where the kernel is, None for the table of all."""

    name: str
    sm: int
    file: str | None


class CompileError(Exception):
    """A kernel cannot be compiled or launched as it is."""


# ---------------------------------------------------------------------------------------------- in the worker processes


def compile_kernel(task: Task) -> tuple[ArchivedKernel, int]:
    """The kernel's archive entry, and the CUDA version of its assembler (1000 * major + 10 * minor).

    Raises:
      CompileError: Triton refuses it, or it needs what the launcher does not give.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = _table(task.file)[task.name]
    names = variant.function.arg_names
    source = ASTSource(
        fn=variant.function,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned_arguments},
    )
    cuda_version = _choose_assembler(triton, task.sm)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fuse,
    }

    def compiled(**more: Any) -> ArchivedKernel:
        try:
            found = triton.compile(source, target=GPUTarget("cuda", task.sm, 32), options={**options, **more})
        except Exception as error:  # noqa: BLE001 - Triton raises of every kind
            lines = str(error).strip().splitlines() or [""]
            said = f"{type(error).__name__}: {' '.join(lines[-3:])}"
            raise CompileError(f"`{task.name}` for sm_{task.sm}: {said}") from None
        return _entry(variant, found, task.sm)

    if variant.most_registers is not None:
        few = compiled(maxnreg=variant.most_registers)
        if not few.spill_bytes:
            return few, cuda_version
    return compiled(), cuda_version


def _entry(variant: Any, compiled: Any, sm: int) -> ArchivedKernel:
    metadata, cubin = compiled.metadata, compiled.asm["cubin"]
    facts = cubin_facts(cubin)
    expected = [LETTER_BYTES[letter] for letter in variant.letters] + [8] * HIDDEN_PARAMETERS
    found = list(facts.parameter_bytes)
    if found != expected:
        raise CompileError(f"`{variant.name}` for sm_{sm}: expected parameters of {expected} bytes, found {found}")
    if facts.threads != (32 * metadata.num_warps, 1, 1):
        raise CompileError(f"`{variant.name}` for sm_{sm}: {metadata.num_warps} warps, but threads {facts.threads}")
    special = metadata.launch_pdl or metadata.launch_cooperative_grid
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1 or special:
        raise CompileError(f"`{variant.name}` for sm_{sm}: needs scratch memory or clusters, which the launcher lacks")
    most = LIMITS[sm].shared_bytes_a_block
    if metadata.shared > most:
        raise CompileError(
            f"`{variant.name}` for sm_{sm}: needs {metadata.shared} bytes of shared memory, a block has at most {most}"
        )
    return ArchivedKernel(
        name=variant.name,
        symbol=facts.symbol,
        letters=variant.letters,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=facts.registers,
        spill_bytes=facts.local_bytes,
        cubin=cubin,
    )


def _choose_assembler(triton: Any, sm: int) -> int:
    """Take the assembler of the older CUDA wherever it knows the generation; its version."""
    tools = triton.knobs.nvidia
    older, newer = _assemblers()
    chosen = newer if sm in ONLY_CUDA_13 or sm > NEWEST_OF_CUDA_12 else older
    tools.ptxas = tools.ptxas_blackwell = chosen
    major, minor = (int(number) for number in tools.ptxas.version.split("."))
    return 1000 * major + 10 * minor


@functools.cache
def _assemblers() -> tuple[str, str]:
    import triton

    tools = triton.knobs.nvidia
    return tools.ptxas.path, tools.ptxas_blackwell.path


@functools.cache
def _table(file: str | None) -> dict[str, Any]:
    module = gpu_module("variants") if file is None else kernel_file(Path(file))
    return {variant.name: variant for variant in module.variants()}


def _start_worker() -> None:
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_DISABLE_LINE_INFO": "1",  # or the file's path would be inside
        "TRITON_DEFAULT_FP_FUSION": "1",  # each variant says so for itself
    }
    os.environ.update(settings)


# ----------------------------------------------------------------------------------------------------- in this process


def table_in_process(file: str | None) -> dict[str, Any]:
    """All kernels by name, without running any; for a process that only lists them."""
    _start_worker()
    return _table(file)


def compile_all(
    names: Sequence[str], generations: Sequence[int], *, file: str | None = None, jobs: int = 1
) -> dict[int, tuple[int, list[ArchivedKernel]]]:
    """Compile kernels for generations, in parallel.

    Returns:
      for each generation the CUDA version that its driver must at least have, and its kernels in the order of `names`.

    Raises:
      CompileError: of the first kernel that failed, once all have been tried.
    """
    tasks = [Task(name, sm, file) for sm in generations for name in names]
    done: dict[Task, tuple[ArchivedKernel, int]] = {}
    errors: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks))), context, initializer=_start_worker) as pool:
        futures: dict[Future[Any], Task] = {pool.submit(compile_kernel, task): task for task in tasks}
        for count, future in enumerate(as_completed(futures), 1):
            task = futures[future]
            try:
                done[task] = future.result()
            except CompileError as error:
                errors.append(str(error))
            say_progress(count, len(tasks), f"{task.name} sm_{task.sm}")
    if errors:
        raise CompileError("\n".join(sorted(errors)))
    found = {}
    for sm in generations:
        entries = [done[Task(name, sm, file)] for name in names]
        found[sm] = max((version for _, version in entries), default=0), [kernel for kernel, _ in entries]
    return found


def say_progress(done: int, total: int, what: str) -> None:
    """One line that is written over on a terminal, and now and then one elsewhere."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\033[K{done}/{total} {what}", end=end, file=sys.stderr, flush=True)
    elif done == total or done % 50 == 0:
        print(f"{done}/{total} kernels compiled", file=sys.stderr, flush=True)


def write_archives(folder: Path, compiled: dict[int, tuple[int, list[ArchivedKernel]]]) -> dict[int, int]:
    """Write one archive for each generation, whole or not at all; bytes by generation."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for sm, (cuda_version, kernels) in compiled.items():
        data = archive_bytes(sm, cuda_version, kernels)
        temporary = folder / f".{archive_name(sm)}.{os.getpid()}"
        temporary.write_bytes(data)
        temporary.replace(folder / archive_name(sm))
        sizes[sm] = len(data)
    return sizes


def summary(compiled: dict[int, tuple[int, list[ArchivedKernel]]]) -> list[dict[str, Any]]:
    """What `--json` says of each kernel and generation."""
    return [
        {
            "sm": sm,
            **{key: value for key, value in asdict(kernel).items() if key != "cubin"},
            "bytes": len(kernel.cubin),
        }
        for sm, (_, kernels) in compiled.items()
        for kernel in kernels
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile the GPU kernels ahead of time.")
    parser.add_argument("--sm", default=",".join(map(str, GENERATIONS)), help="generations, e.g. 87,110")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder of the archives")
    parser.add_argument("--only", default="", metavar="PREFIX", help="kernels whose names start so; writes no archive")
    parser.add_argument("--kernels", metavar="FILE", help="the kernels of another file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table of kernels here; no archives")
    parser.add_argument("--json", action="store_true", help="figures of every kernel to stdout")
    found = parser.parse_args(arguments)
    try:
        found.sm = [int(number) for number in found.sm.split(",")]
    except ValueError:
        parser.error(f"--sm: expected numbers such as 87,110, found `{found.sm}`")
    unknown = [sm for sm in found.sm if sm not in LIMITS]
    if unknown:
        parser.error(f"--sm: expected some of {sorted(LIMITS)}, found {unknown}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        table = table_in_process(options.kernels)
    except ImportError as error:
        print(f"error: the GPU kernels need Triton to be compiled: {error}", file=sys.stderr)
        print("hint: pip install 'streamo-edge[gpu-build]'", file=sys.stderr)
        return 1
    names = [name for name in table if name.startswith(options.only)]
    begin = time.monotonic()
    try:
        compiled = compile_all(names, options.sm, file=options.kernels, jobs=options.jobs)
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    spilling = [(sm, kernel) for sm, (_, kernels) in compiled.items() for kernel in kernels if kernel.spill_bytes]
    for sm, kernel in spilling:
        text = f"`{kernel.name}` for sm_{sm} keeps {kernel.spill_bytes} bytes a thread in local memory, which is slow"
        print(f"warning: {text}", file=sys.stderr)
    document: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1), "kernels": summary(compiled)}
    if options.report:
        module = gpu_module("variants") if options.kernels is None else kernel_file(Path(options.kernels))
        options.report.write_text(report(compiled, module.work()), encoding="utf-8")
    elif not options.only:
        document["bytes"] = write_archives(options.output, compiled)
    if options.json:
        print(json.dumps(document))
    return 0

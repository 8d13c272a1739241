"""`streamo-edge bench kernels`: the machine's peaks, then every kernel beside what else could do its work.

Owns the order, the report's form and its Markdown. Each part is measured in a module of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apps.bench import attention, matmul, model, peaks
from apps.bench.machine import machine_card
from apps.bench.model import Peers
from apps.bench.timing import PEAK, add_fraction_of_peak
from edge import native
from edge.errors import BackendError

Progress = Callable[[str, float, float], None]


def measure(
    parts: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    *,
    workdir: Path | None,
    peers: Peers,
    size: str,
    layers: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the chosen parts, each with every number of threads.

    Args:
      parts: of "peaks", "attention", "matmul" and "model"; peaks come first whether they are named or not, as
        everything is compared with them.
      workdir: where the model's bundle is kept; None for a folder that is removed afterwards.

    Returns:
      `peaks` by number of threads, `rows`, `instruction_set` and the machine.

    Raises:
      BackendError: the native kernels are not there.
      UsageError: `onnx`, or a peer that was asked for, is missing.
    """
    if reason := native.available():
        raise BackendError(reason, hint="Install a C++ compiler, then install streamo-edge again")
    steps = len(parts) * len(threads)
    progress("peaks", 0, steps)
    best = peaks.measure(threads, max(3, rounds))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="streamo-bench-") as temporary:
        folder = workdir or Path(temporary)
        measures: dict[str, Callable[[int], list[dict[str, Any]]]] = {
            "peaks": lambda count: [],
            "attention": lambda count: attention.measure(count, rounds),
            "matmul": lambda count: matmul.measure(count, rounds, peers.openvino_python),
            "model": lambda count: model.measure(folder, count, rounds, size=size, layers=layers, peers=peers),
        }
        for done, (count, part) in enumerate((count, part) for count in threads for part in parts):
            progress(f"{part}, threads: {count}", done, steps)
            rows += measures[part](count)
            best = peaks.best_of(best, peaks.measure(threads, 2))
    for row in rows:
        add_fraction_of_peak(row, best[str(row["threads"])])
    progress("done", steps, steps)
    return {
        "peaks": best,
        "rows": rows,
        "instruction_set": native.instruction_set(),
        "rounds": rounds,
        "machine": machine_card(max(threads)),
    }


def peak_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Threads, GB/s, int8 GOP/s, float32 GFLOP/s."""
    return [
        (count, f"{found['read_gbs']:.1f}", f"{found['int8_gops']:.0f}", f"{found['f32_gops']:.0f}")
        for count, found in result["peaks"].items()
    ]


PEAK_HEADINGS = ("threads", "read GB/s", "int8 GOP/s", "float32 GFLOP/s")
HEADINGS = ("what", "threads", "ours us", "median", "fastest other", "us", "median", "ratio", "goals", "of peak")


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report's rows as text."""
    found: list[tuple[str, ...]] = []
    for row in result["rows"]:
        goals = "; ".join(_goal_text(name, goal) for name, goal in row["goals"].items())
        peak = "GB/s" if row["bound"] == "read_gbs" else "GOP/s"
        rate = row["gbs"] if row["bound"] == "read_gbs" else row["gops"]
        found.append(
            (
                f"{row['name']}: {row['shape']}",
                str(row["threads"]),
                f"{row['ours_us']:.0f}",
                f"{row['ours_us_median']:.0f}",
                str(row["stock"]),
                f"{row['stock_us']:.0f}",
                f"{row['stock_us_median']:.0f}",
                f"{row['speedup']:.2f}",
                goals,
                f"{row['fraction_of_peak']:.0%} ({rate:.0f} {peak})",
            )
        )
    return found


def _goal_text(name: str, goal: dict[str, Any]) -> str:
    wanted, found = ((f"{goal[key]:.0%}" if name == PEAK else f"{goal[key]:.2f}x") for key in ("wanted", "found"))
    return f"{wanted} {name}: {'reached' if goal['reached'] else 'missed'} ({found})"


def markdown(result: dict[str, Any]) -> str:
    """Both tables, for the documentation."""
    return _markdown(PEAK_HEADINGS, peak_rows(result)) + "\n" + _markdown(HEADINGS, table_rows(result))


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

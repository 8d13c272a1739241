"""The figures of `bench quantisation` as a markdown table and as a plot. Knows only the rows' keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LEAST_KL = 1e-7
"""Drawn for all that is smaller."""

COLUMNS = (
    ("weights and KV cache", "name", "{}"),
    ("bundle MB", "bundle_bytes", "{:.2f}"),
    ("decoder MB", "decoder_bytes", "{:.2f}"),
    ("KV bytes a token", "kv_bytes_per_token", "{:d}"),
    ("KL mean", "kl_mean", "{:.2g}"),
    ("KL 99 %", "kl_p99", "{:.2g}"),
    ("KL max", "kl_max", "{:.2g}"),
    ("top-1", "top1_agreement", "{:.4f}"),
    ("states flipped", "state_flips", "{:d}"),
    ("F1", "response_f1", "{:.3f}"),
    ("state accuracy", "state_accuracy", "{:.3f}"),
    ("ms a turn", "turn_ms", "{:.1f}"),
    ("least", "turn_ms_min", "{:.1f}"),
)


def table_rows(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; columns that no row has are left out."""
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    cells = [[_cell(row, key, form) for _, key, form in columns] for row in rows]
    return [heading for heading, _, _ in columns], cells


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    return form.format(value / 1e6 if key in ("bundle_bytes", "decoder_bytes") else value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    headings, cells = table_rows(rows)
    lines = [headings, ["---"] * len(headings), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One line for every precision: the decoder's bytes, divergence, and where streams were run F1 and time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("decoder_bytes", "decoder weights, MB"), ("kl_mean", "mean KL to the unquantised model")]
    if any("response_f1" in row for row in rows):
        panels += [("response_f1", "response F1, free-running"), ("turn_ms", "ms a silent turn, median")]
    height = 1.2 + 0.32 * len(rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 + 3 * len(panels), height), sharey=True, squeeze=False)
    colours = {"gptq": "C2", "nearest": "C1", None: "0.5"}
    names = [row["name"] for row in rows]
    for plot, (key, label) in zip(axes[0], panels, strict=True):
        values = [row[key] / 1e6 if key == "decoder_bytes" else max(row[key], LEAST_KL) for row in rows]
        plot.barh(names, values, color=[colours[row["method"]] for row in rows], height=0.7)
        plot.set_xlabel(label)
        plot.grid(alpha=0.3, axis="x")
        if key == "kl_mean":
            plot.set_xscale("log")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=100)

"""The figures of `bench quantisation` as a markdown table and as a plot. Knows only the rows' keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    """Divergence over the decoder's bytes, and F1 over the same where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = any("response_f1" in row for row in rows)
    figure, axes = pyplot.subplots(1, 1 + scored, figsize=(5 + 5 * scored, 4.5), constrained_layout=True, squeeze=False)
    kinds = {"gptq": ("C2", "o", "GPTQ"), "nearest": ("C1", "s", "round to nearest"), None: ("0.4", "^", "float")}
    for row in rows:
        colour, marker, label = kinds[row["method"]]
        filled = colour if row["kv"] == "int8" else "none"
        style: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": filled, "linestyle": "none"}
        megabytes = row["decoder_bytes"] / 1e6
        note = f"{row['weights']}/{row['block']}" if row["method"] else row["weights"]
        points = [("kl_mean", max(row["kl_mean"], 1e-12)), ("response_f1", row.get("response_f1"))]
        for plot, (_, value) in zip(axes[0], points, strict=False):
            plot.plot(megabytes, value, **style)
            plot.annotate(note, (megabytes, value), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("mean KL to the unquantised model, held-out turns")
    if scored:
        axes[0][1].set_ylabel("response F1, free-running")
    for colour, marker, label in kinds.values():
        axes[0][0].plot([], [], color=colour, marker=marker, linestyle="none", label=label)
    axes[0][0].plot([], [], color="k", marker="o", linestyle="none", label="filled: int8 KV cache")
    axes[0][0].legend(fontsize=8)
    for plot in axes[0]:
        plot.set_xlabel("decoder weights, MB")
        plot.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

"""Draws the learning curve that training wrote: `python -m apps.demo.curve CURVE.jsonl... --out curve.png`.

Knows only the names of the logged figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read_curve(paths: list[Path]) -> list[dict]:
    """All records, with `minutes` running on from one file to the next."""
    records, before_minutes = [], 0.0
    for path in paths:
        last_minutes = 0.0
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["minutes"] < last_minutes:  # a new phase starts its own clock
                before_minutes += last_minutes
            last_minutes = record["minutes"]
            records.append({**record, "minutes": before_minutes + last_minutes})
        before_minutes += last_minutes
    return records


def draw_curve(records: list[dict], out: Path) -> None:
    """Losses above, figures of free runs below, both over minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, quality) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, constrained_layout=True)
    vision = [record for record in records if record["phase"] == "vision"]
    joint = [record for record in records if record["phase"] in ("joint", "polish", "endurance")]
    runs = [record for record in records if record["phase"] == "evaluation"]
    losses.plot([r["minutes"] for r in vision], [r["total"] for r in vision], color="0.6", label="vision heads (alone)")
    for name, label in (("state", "states"), ("text", "words"), ("events", "event heads")):
        losses.plot([r["minutes"] for r in joint], [r[name] for r in joint], linewidth=1, label=label)
    losses.set_yscale("log")
    losses.set_ylabel("loss")
    losses.legend(fontsize=8)
    minutes = [r["minutes"] for r in runs]
    quality.plot(minutes, [r["response_f1"] for r in runs], "k.-", label="response F1, all")
    quality.plot(minutes, [r["state_accuracy"] for r in runs], "k.:", label="state accuracy, all")
    for task in sorted({task for r in runs for task in r["tasks"]}):
        points = [(r["minutes"], r["tasks"][task]["response_f1"]) for r in runs if task in r["tasks"]]
        quality.plot(*zip(*points, strict=True), linewidth=1, label=f"F1, {task.replace('_', ' ')}")
    quality.set_ylim(0, 1.02)
    quality.set_ylabel("20 unseen streams, free-running")
    quality.set_xlabel("minutes of training")
    quality.legend(fontsize=8)
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a learning curve.")
    parser.add_argument("curves", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw_curve(read_curve(arguments.curves), arguments.out)


if __name__ == "__main__":
    main()

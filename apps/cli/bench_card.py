"""The machine beside a benchmark's figures, and a warning where it was busy with something else.

Owns both texts. Measures nothing.
"""

from __future__ import annotations

from typing import Any

from apps.cli import console


def print_card(machine: dict[str, Any], file: Any) -> None:
    """The machine that was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("load", f"{machine['load_average_1min']} (average of the last minute)"),
        ("software", f"{machine['system']}, Python {machine['python']}, {versions}"),
    ]
    console.facts("machine", rows, file)


def warn_if_busy(machine: dict[str, Any]) -> None:
    """Say so where other work must have disturbed the measurement."""
    if (machine["load_average_1min"] or 0) > machine["cores"] + 1:
        console.say(
            f"warning: The machine is busy (load {machine['load_average_1min']} on {machine['cores']} cores); "
            "the figures say little"
        )

"""What every benchmark reports: the machine, a warning where it was busy with something else, its figures, the JSON.

Owns their order, the first two texts, and what is said of a file that cannot be written. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apps.cli import console
from edge.errors import OutputError


def report(result: dict[str, Any], show: Callable[[dict[str, Any], Any], None], *, as_json: bool) -> None:
    """Print a finished benchmark.

    Args:
      result: with the machine under `machine`.
      show: prints the figures of a result to a stream.
      as_json: whether standard output is for one JSON document.
    """
    file = console.report_stream(as_json)
    print_card(result["machine"], file)
    warn_if_busy(result["machine"])
    show(result, file)
    if as_json:
        console.print_json(result)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file it was that could not be written in the block.

    Raises:
      OutputError: it could not.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that there is not
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"`{path}` cannot be written: {reason}", hint="Choose another file or folder") from None


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

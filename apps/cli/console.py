"""What people see: messages, tables and progress bars, all on stderr unless they are the answer itself.

Owns every use of rich. With `--json` the last line of stdout is one JSON document, and people's text moves to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from edge.memory import bytes_text as bytes_text

REDRAW_S = 0.1


def say(text: str) -> None:
    """A line for people, on stderr; where nobody can be told, nothing happens."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def show_error(message: str, hint: str | None) -> None:
    """The one form in which an error reaches a user."""
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")


def print_json(document: dict[str, Any]) -> None:
    """The machine's answer, as the last line of stdout."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def report_stream(as_json: bool) -> TextIO:
    """Where tables go: stdout when they are the answer, stderr when JSON is."""
    return sys.stderr if as_json else sys.stdout


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], file: TextIO) -> None:
    """Print a table below its title; all columns but the first are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, highlight=False)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        grid.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    if not console.is_terminal:
        wide = console.options.update(max_width=1000)
        console.width = max(console.width, console.measure(grid, options=wide).maximum)
    if title:
        print(title, file=file)
    console.print(grid)
    file.flush()


def facts(title: str, rows: Sequence[tuple[str, object]], file: TextIO) -> None:
    """Print names with their values."""
    width = max((len(name) for name, _ in rows), default=0)
    print(title, file=file)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}", file=file)
    print(file=file, flush=True)


class Progress:
    """A progress bar that is told `(what, done, total)`; it draws only when told, so it disturbs no measurement."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}
        self._drawn_s = 0.0

    def __call__(self, what: str, done: float, total: float) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)
        now_s = time.monotonic()
        if done >= total or now_s - self._drawn_s > REDRAW_S:
            self._drawn_s = now_s
            self._bar.refresh()


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr; where stderr is no terminal, only the names of the steps are printed."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, auto_refresh=False) as bar:
        yield Progress(bar)


class _PlainProgress(Progress):
    def __init__(self) -> None:
        super().__init__(None)
        self._last = ""

    def __call__(self, what: str, done: float, total: float) -> None:
        if what != self._last:
            self._last = what
            say(f"{what} ...")

"""Which bundle a command works with, and optional packages that are missing as an error with a hint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.errors import UsageError

_OURS = ("edge", "export", "apps")


def chosen_bundle(given: str | None, progress: Callable[[str, int, int], None]) -> Path:
    """The bundle that was given, or the shipped model's, which is exported at its first use.

    Raises:
      UsageError: the export needs a package that is not installed.
    """
    if given is not None:
        return Path(given)
    with extra_packages("demo", "The export of the shipped model"):
        from apps.demo.bundle import demo_bundle

        return demo_bundle(progress)


@contextmanager
def extra_packages(extra: str, what: str) -> Iterator[None]:
    """Say which of the optional packages `what` lacks, and that `extra` brings it.

    Raises:
      UsageError: an import in the block found no such package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _OURS:
            raise
        raise UsageError(
            f"{what} needs the package `{package}`, which is not installed",
            hint=f"In the checkout: pip install '.[{extra}]'",
        ) from None

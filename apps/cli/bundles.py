"""Which bundle a command works with, and optional packages that are missing as an error with a hint."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.errors import UsageError

WEIGHTS = ("fp32", "fp16", "int8", "int4")
KV = ("fp32", "int8")
"""Precisions that `export` offers."""
_OURS = ("edge", "export", "apps")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The option that chooses the bundle, for commands that can do with the shipped model; see `chosen_bundle`."""
    parser.add_argument(
        "--bundle", metavar="BUNDLE", help="folder that `streamo-edge export` wrote; default the shipped one"
    )


def add_precisions(parser: argparse.ArgumentParser) -> None:
    """The options that choose how the shipped model is exported."""
    parser.add_argument("--weights", choices=WEIGHTS, help="of the shipped model's export; default fp32")
    parser.add_argument("--kv", choices=KV, help="its KV cache; default int8 with int8 or int4 weights, else fp32")


def chosen_bundle(
    given: str | None,
    progress: Callable[[str, int, int], None],
    *,
    weights: str | None = None,
    kv: str | None = None,
) -> Path:
    """The bundle that was given, or the shipped model's, which is exported at its first use.

    Args:
      weights, kv: precisions of the shipped model's export; None: see `export`.

    Raises:
      UsageError: precisions for a bundle that has its own, or the export needs a package that is not installed.
    """
    if given is not None:
        if weights or kv:
            raise UsageError(
                f"Bundle `{given}` has its own precisions; `--weights` and `--kv` are for the shipped model",
                hint="Export the checkpoint again with these options, or leave out `--bundle`",
            )
        return Path(given)
    with extra_packages("demo", "The export of the shipped model"):
        from apps.demo.bundle import demo_bundle

        return demo_bundle(progress, weights=weights or "fp32", kv=kv)


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

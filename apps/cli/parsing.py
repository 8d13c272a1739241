"""Argument parsing that ends in a clear message and a hint instead of a wall of usage text.

Owns the parser class and the converters of argument values. Knows no command.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from edge.errors import UsageError

MOST = 2**63 - 1
"""No number of an option is larger, so that no later arithmetic has to fear it."""
MOST_SEEDS = 1_000_000
LEAST_FPS = 0.001


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError` with a hint."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = message[:1].upper() + message[1:]
        raise UsageError(message, hint=self._meant(message) or f"See `{self.prog} --help`")

    def _meant(self, message: str) -> str | None:
        if match := re.match(r"Unrecognized arguments: (-\S+)", message):
            option = closest(match[1].partition("=")[0], self._option_string_actions)
            return f"Did you mean `{option}`?" if option else None
        if match := re.match(r"Argument .*: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choice = closest(match[1], re.findall(r"[\w.-]+", match[2]))
            return f"Did you mean `{choice}`?" if choice else None
        return None


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else None


def number(
    kind: type,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = MOST,
    unit: str = "",
) -> Callable:
    """A converter for argparse: a finite `kind` within bounds; `unit` is named in the message."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        named = f"a {'whole number' if kind is int else 'number'}{f' of {unit}' if unit else ''}"
        found = text if len(text) <= 40 else f"{text[:40]}... ({len(text)} characters)"
        if value != value or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"expected {named}, found {found!r}")
        if at_least is not None and value < at_least:
            raise argparse.ArgumentTypeError(f"expected {named} of at least {at_least}, found {found}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"expected {named} above {above}, found {found}")
        if value > at_most:
            raise argparse.ArgumentTypeError(f"expected {named} of at most {at_most}, found {found}")
        return value

    return convert


thread_count = number(int, at_least=1, at_most=1024, unit="threads")
"""A number of threads, for argparse."""


def turn_rate(text: str) -> float:
    """Turns a second, for argparse; what the protocol cannot do is told by the check that the runtime makes."""
    from edge.pacing import check_turn_rate

    return check_turn_rate(number(float, at_least=LEAST_FPS)(text))


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A converter for argparse: names of `known` with commas between."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {wrong[0]!r}")
        return names

    return convert


def seed_range(text: str) -> range:
    """`50000:50050` (the end is not included) or one seed, for argparse."""
    match = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a range of seeds like 50000:50050, found {text!r}")
    start = int(match[1])
    seeds = range(start, int(match[2]) if match[2] else start + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"expected a range whose end is above its start, found {text}")
    if len(seeds) > MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_SEEDS} seeds, found {len(seeds)}: {text}")
    return seeds

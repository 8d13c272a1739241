"""Where a command's model runs: the options, and what is said about it.

Owns the words. `edge.backends` knows the backends.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from apps.cli import console

if TYPE_CHECKING:
    from edge.session import StreamSession

BACKENDS = ("cpu", "cuda", "tensorrt")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The options that choose where the model runs; see `backend_options`."""
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="cpu", help="default cpu")
    add("--require-gpu", action="store_true", help="refuse to start where any part of the model would run on the CPU")
    add(
        "--skip-parity",
        action="store_true",
        help="at a bundle's first run here, do not check that it computes what it did where it was exported",
    )


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a `StreamSession` is given for these options."""
    return {
        "backend": args.backend,
        "require_gpu": args.require_gpu,
        "check_first_run": not args.skip_parity,
    }


def say_where(session: StreamSession) -> None:
    """Tell people which component runs where, and what could not be had as it should be."""
    for component, where in session.placement.items():
        console.say(f"{component}: {where}")
    for notice in session.notices:
        console.say(f"warning: {notice}")

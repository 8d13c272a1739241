"""The names of the policies that decide what a full window does, and the choice between them."""

from __future__ import annotations

from edge.errors import UsageError

SLIDE = "slide"
REBUILD = "rebuild"
POLICIES = (SLIDE, REBUILD)


def check_policy(wanted: str | None) -> None:
    """Refuse a name that is none; None stands for the default.

    Raises:
      UsageError: as said.
    """
    if wanted is not None and wanted not in POLICIES:
        raise UsageError(f"The policy should be `slide` or `rebuild`, found `{wanted}`", hint="Use `--policy slide`")


def chosen_policy(wanted: str | None, *, evicts_in_place: bool) -> str:
    """The policy of a session: `slide`, unless the other is wanted or the backend cannot evict in place.

    Raises:
      UsageError: no such policy, or `slide` is wanted and impossible.
    """
    check_policy(wanted)
    if wanted == SLIDE and not evicts_in_place:
        raise UsageError(
            "Policy `slide` needs a backend that evicts in place, and this one, with stock operators, cannot",
            hint="Use `--policy rebuild`, or a bundle and an installation with the native kernels",
        )
    return wanted or (SLIDE if evicts_in_place else REBUILD)

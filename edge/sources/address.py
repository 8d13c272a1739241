"""Addresses of cameras, which may hold a password.

A `SourceUrl` shows its password to nobody who only prints it. Does not know how an address is opened.
"""

from __future__ import annotations

from edge.masking import mask_secrets


class SourceUrl:
    """An address that may hold credentials: `str` and `repr` are masked, only `reveal` gives it whole."""

    __slots__ = ("_secret",)

    def __init__(self, text: str) -> None:
        self._secret = text

    def reveal(self) -> str:
        """The whole address, for the call that opens it and nothing else."""
        return self._secret

    def __str__(self) -> str:
        return mask_secrets(self._secret)

    def __repr__(self) -> str:
        return f"SourceUrl({str(self)!r})"

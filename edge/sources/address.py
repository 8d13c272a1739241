"""Addresses of cameras, which may hold a password.

Owns the masking: a `SourceUrl` shows its password to nobody who only prints it, and `mask_secrets` cleans texts that
other libraries wrote. Does not know how an address is opened.
"""

from __future__ import annotations

import re

MASK = "***"
# Up to the last @ of the word: passwords hold unescaped @ and / in practice.
_USER_INFO = re.compile(r"(?<=://)[^\s\"'`]*@")
_QUERY = re.compile(r"(://[^\s\"'`?]*)\?[^\s\"'`]+")
_NAMED_SECRET = re.compile(
    r"(?<![A-Za-z])((?:user[-_]?)?(?:passw(?:or)?d|passwd|pass|pwd|pw|token|secret|api[-_]?key|key|auth))=[^\s&/;,!\"'`_]+",
    re.IGNORECASE,
)


def mask_secrets(text: str) -> str:
    """`text` without user names, passwords and queries of addresses and without values of `password=` and the like."""
    text = _USER_INFO.sub(f"{MASK}@", text)
    text = _QUERY.sub(rf"\1?{MASK}", text)
    return _NAMED_SECRET.sub(rf"\1={MASK}", text)


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

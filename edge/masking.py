"""Texts without the passwords they may hold: addresses of cameras, and what other libraries wrote about them.

Owns the patterns. Does not know where a text goes.
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

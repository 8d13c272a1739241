"""Text of the model made harmless for terminals, captions and pictures: one line, nothing that moves a cursor."""

from __future__ import annotations

import unicodedata


def one_line(text: str) -> str:
    """`text` with runs of blanks as one space and control characters spelt out, so that none has an effect."""
    return _spelt_out(" ".join(text.split()))


def one_line_piece(piece: str) -> str:
    """Like `one_line` for a piece in the middle of a text: blanks at its ends stay, line ends become spaces."""
    return _spelt_out("".join(" " if character.isspace() else character for character in piece))


def stream_time(seconds: float) -> str:
    """Stream time for people: `00:05:10`."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _spelt_out(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    # Cc: escape sequences; Cf: text direction overrides; Cs, Co: no character at all; Zl, Zp: line ends.
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in "\u200c\u200d":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

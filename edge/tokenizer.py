"""Text to token ids and back, with the pieces of a reply given out as soon as they are whole characters.

Owns the `tokenizers` library's object. Knows nothing of turns (see `prompt`) nor of what is decoded (see `session`).
"""

from __future__ import annotations

import codecs
from functools import lru_cache
from pathlib import Path

from edge.errors import BundleError


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable characters stand for themselves, the others for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class Tokenizer:
    """Byte-level BPE tokenizer read from a bundle's `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise BundleError(
                "Reading a bundle needs the package `tokenizers`", hint="pip install tokenizers"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise BundleError(f"`{path.name}` is not a readable tokenizer: {error}") from None
        self._added = {
            token_id: token.content for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised, none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that one token stands for: perhaps part of a character; none for an unknown id."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        table = _byte_of_character()
        return bytes(table[character] for character in token if character in table)


class ReplyText:
    """The growing text of one reply: feed token ids, get whole characters.

    A character whose bytes are spread over several tokens appears when its last byte has come; bytes that never
    become a character are shown as U+FFFD at the end. White space in front of the reply is not part of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""

    @property
    def text(self) -> str:
        return self._text

    def push(self, token_id: int) -> str:
        """Add one token; return the new whole characters, perhaps none."""
        return self._add(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """No token follows; return what was held back."""
        return self._add(self._decoder.decode(b"", final=True))

    def _add(self, piece: str) -> str:
        if not self._text:
            piece = piece.lstrip()
        self._text += piece
        return piece

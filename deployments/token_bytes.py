"""The bytes that single tokens stand for, which may be parts of characters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

_SPACE = "\u2581"
"""SentencePiece's visible space."""
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Looks tokens up in one vocabulary, by the way its decoder writes bytes.

    Known are byte-level vocabularies, where each character of a token is one byte, and
    SentencePiece's, where a byte without a token of its own is spelt ``<0x..>``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        decoder = tokenizer.decoder
        kinds = set(_kinds(orjson.loads(decoder.__getstate__()))) if decoder is not None else set()
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_fallback = "ByteFallback" in kinds

    def of(self, token_id: int) -> bytes:
        """The bytes of a token, whatever stands beside it.

        A special token gives its name, which texts leave out; an unknown id gives none.
        """
        name = self._added.get(token_id)
        if name is not None:
            return name.encode()
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        fallback = _FALLBACK.fullmatch(token) if self._has_byte_fallback else None
        if fallback is not None:
            return bytes.fromhex(fallback[1])
        return token.replace(_SPACE, " ").encode()


def printed(data: bytes) -> str:
    """A token as text: its characters, or the hexadecimal escapes of an incomplete one's bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for part in decoder.get("decoders", []):
        yield from _kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()

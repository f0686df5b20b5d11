from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from deployments.token_bytes import TokenBytes, printed
from deployments.tokenizer import Tokenizer
from tests.fakes_tokenizer import SPECIALS, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "text", ["the cat", "é😀 漢字", " leading\n\ttab", "".join(map(chr, range(256)))]
)
def test_bytes_of_byte_level_tokens_add_up_to_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "model"))
    token_ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()


def test_special_and_unknown_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "model"))
    assert tokenizer.token_bytes(0) == SPECIALS[0].encode()
    assert tokenizer.token_bytes(10**6) == b""


def test_a_sentencepiece_vocabulary() -> None:
    vocab = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "é": 3, "<s>": 4}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    token_bytes = TokenBytes(backend)
    assert [token_bytes.of(i) for i in (1, 2, 3, 4)] == [b" the", b"\xe2", "é".encode(), b"<s>"]


def test_a_vocabulary_without_a_decoder() -> None:
    backend = Backend(models.WordLevel(vocab={"word": 0, "<0xE2>": 1}, unk_token="word"))
    assert [TokenBytes(backend).of(i) for i in (0, 1)] == [b"word", b"<0xE2>"]


def test_parts_of_characters_are_printed_in_hexadecimal() -> None:
    assert printed("é".encode()) == "é"
    assert printed("é".encode()[:1]) == "\\xc3"

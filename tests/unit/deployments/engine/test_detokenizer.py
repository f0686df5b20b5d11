from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.detokenizer import IncrementalDetokenizer


def decode_bytes(token_ids: object) -> str:
    """Token i is byte i: the hardest split of UTF-8 there is."""
    return bytes(token_ids).decode("utf-8", errors="replace")  # type: ignore[arg-type]


def pieces_of(token_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    return [*(detokenizer.push(token) for token in token_ids), detokenizer.flush()]


@given(st.text(max_size=80))
def test_no_piece_ever_shows_half_a_character(text: str) -> None:
    pieces = pieces_of(list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=120))
def test_any_bytes_give_what_decoding_them_at_once_gives(token_ids: list[int]) -> None:
    assert "".join(pieces_of(token_ids)) == decode_bytes(token_ids)


@given(st.lists(st.sampled_from(["😀", "👨‍👩‍👧", "é", "a", "\ufffd", "漢"]), max_size=30))
def test_emoji_and_genuine_replacement_characters(parts: list[str]) -> None:
    text = "".join(parts)
    assert "".join(pieces_of(list(text.encode()))) == text


def test_the_window_stays_bounded() -> None:
    sizes: list[int] = []

    def decode(token_ids: object) -> str:
        sizes.append(len(token_ids))  # type: ignore[arg-type]
        return decode_bytes(token_ids)

    detokenizer = IncrementalDetokenizer(decode)
    for token in b"\x80" * 300 + b"abc" * 300:
        detokenizer.push(token)
    assert max(sizes) <= 40

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.detokenizer import ChoiceText, IncrementalDetokenizer, StopStringCutter
from deployments.engine.types import FinishReason, TokenDelta, TokenLogprob


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


def cut(pieces: list[str], stops: list[str], stop_match: str | None) -> str:
    cutter = StopStringCutter(stops)
    shown = [cutter.push(piece) for piece in pieces[:-1]]
    return "".join([*shown, cutter.finish(pieces[-1], stop_match)])


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_without_a_match_all_text_is_shown(text: str, stops: list[str]) -> None:
    assert cut([*text, ""], stops, None) == text


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_nothing_of_the_stop_string_is_ever_shown(text: str, stops: list[str], size: int) -> None:
    """The engine stops at the first token that completes any stop string."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for end in range(1, len(pieces) + 1):
        so_far = "".join(pieces[:end])
        matches = [stop for stop in stops if stop in so_far]
        if matches:
            assert cut(pieces[:end], stops, matches[0]) == so_far[: so_far.index(matches[0])]
            return


def test_a_stop_string_that_was_not_meant_to_stop_is_shown() -> None:
    # min_tokens let the first one pass.
    assert cut(["a#", "b", "c#d"], ["#"], "#") == "a#bc"


def delta(ids: bytes, reason: FinishReason | None = None, match: str | None = None) -> TokenDelta:
    return TokenDelta(request_id="r", token_ids=tuple(ids), finish_reason=reason, stop_match=match)


def test_a_choice_over_several_deltas() -> None:
    text = ChoiceText(decode_bytes, ["STOP"])
    assert text.push(delta("é".encode()[:1])).text == ""
    assert text.push(delta("é".encode()[1:] + b"xS")).text == "éx"
    assert text.push(delta(b"T")).text == ""
    assert text.push(delta(b"OP", FinishReason.STOP, "STOP")).text == ""


def test_what_was_held_back_comes_out_at_the_end() -> None:
    text = ChoiceText(decode_bytes, ["STOP"])
    assert text.push(delta(b"aSTO")).text == "a"
    assert text.push(delta(b"", FinishReason.LENGTH)).text == "STO"


def test_an_incomplete_character_at_the_very_end_is_marked() -> None:
    text = ChoiceText(decode_bytes)
    assert text.push(delta(b"a\xf0\x9f", FinishReason.LENGTH)).text == "a\ufffd"


@pytest.mark.parametrize("stop", ["ab", "aab", "aaab"])
def test_repeating_prefixes(stop: str) -> None:
    source = "aaaa" + stop
    pieces = list(source)
    assert cut(pieces, [stop], stop) == source[: source.index(stop)]


def told(
    text: ChoiceText, ids: bytes, reason: FinishReason | None = None, match: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """What one delta shows: text, and (token, offset) of each log probability."""
    logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in ids)
    shown = text.push(
        TokenDelta(
            request_id="r",
            token_ids=tuple(ids),
            finish_reason=reason,
            stop_match=match,
            logprobs=logprobs,
        )
    )
    return shown.text, [(placed.logprob.token_id, placed.text_offset) for placed in shown.logprobs]


def test_log_probabilities_wait_for_their_character() -> None:
    first, second, third = "€".encode()
    text = ChoiceText(decode_bytes)
    assert told(text, bytes([97, first])) == ("a", [(97, 0)])
    assert told(text, bytes([second])) == ("", [])
    assert told(text, bytes([third, 98])) == (
        "€b",
        [(first, 1), (second, 1), (third, 1), (98, 2)],
    )
    assert told(text, bytes([first]), FinishReason.LENGTH) == ("\ufffd", [(first, 3)])


def test_log_probabilities_wait_while_a_stop_string_may_begin() -> None:
    text = ChoiceText(decode_bytes, ["bcd"])
    assert told(text, b"ab") == ("a", [(97, 0)])
    assert told(text, b"c") == ("", [])
    assert told(text, b"a") == ("bca", [(98, 1), (99, 2), (97, 3)])
    assert told(text, b"bcd", FinishReason.STOP, "bcd") == ("", [])


def test_a_token_that_a_stop_string_hides_in_part_is_told() -> None:
    def decode(token_ids: object) -> str:
        return "".join(("ab", "cd")[token] for token in token_ids)  # type: ignore[attr-defined]

    text = ChoiceText(decode, ["bc"])
    assert told(text, bytes([0])) == ("a", [(0, 0)])
    assert told(text, bytes([1]), FinishReason.STOP, "bc") == ("", [])


@given(
    st.lists(st.binary(max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
)
def test_every_token_is_told_once_and_in_order(parts: list[bytes], stops: list[str]) -> None:
    text = ChoiceText(decode_bytes, stops)
    shown = [told(text, part) for part in parts]
    shown.append(told(text, b"x", FinishReason.LENGTH))
    placed = [entry for _, entries in shown for entry in entries]
    assert [token for token, _ in placed] == [*b"".join(parts), *b"x"]
    offsets = [offset for _, offset in placed]
    assert offsets == sorted(offsets)
    assert offsets[-1] < len("".join(part for part, _ in shown))

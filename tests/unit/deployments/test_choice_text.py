from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.choice_text import ChoiceText, StopStringCutter
from deployments.engine.stopping import StopCondition
from deployments.engine.types import FinishReason, TokenDelta, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence


def decode_bytes(token_ids: object) -> str:
    """Token i is byte i: the hardest split of UTF-8 there is."""
    return bytes(token_ids).decode("utf-8", errors="replace")  # type: ignore[arg-type]


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


PARTS = (
    b"a",
    b":",
    b" ",
    b": ",
    b" \xf0\x9f\x98",
    b" \xf0\x9f",
    b"\x98",
    b"\x80",
    b"\x98\x80",
    b"\xe2",
)


@given(
    st.lists(st.integers(0, len(PARTS) - 1), min_size=1, max_size=16),
    st.lists(st.sampled_from([": ", " ", "a:", "\U0001f600", ":a "]), min_size=1, max_size=2),
)
@example([1, 4, 7], [": "])
@example([1, 5, 6, 7], [": "])
def test_what_the_engine_stops_at_is_never_shown(token_ids: list[int], stops: list[str]) -> None:
    def decode(ids: Sequence[int]) -> str:
        return b"".join(PARTS[token] for token in ids).decode(errors="replace")

    condition = StopCondition(
        max_output_tokens=len(token_ids),
        min_tokens=0,
        stop_token_ids=frozenset(),
        stop_strings=stops,
        detokenize=decode,
    )
    text = ChoiceText(decode, stops)
    shown = ""
    for token in token_ids:
        stop = condition.append(token)
        reason, match = (stop.reason, stop.match) if stop is not None else (None, None)
        assert not isinstance(match, int)
        shown += text.push(delta(bytes([token]), reason, match)).text
        if stop is not None:
            break
    written = decode(token_ids[: condition.num_output_tokens])
    at = [written.index(each) for each in stops if each in written]
    assert shown == written[: min(at, default=len(written))]

from __future__ import annotations

import pytest

from deployments.engine.stopping import Stop, StopCondition, StopStringMatcher
from deployments.engine.types import FinishReason


def decode(pieces):
    """Tokens are bytes here; cut characters become U+FFFD as in real tokenizers."""
    return b"".join(pieces).decode(errors="replace")


def first_match(strings, pieces):
    matcher = StopStringMatcher(strings, decode)
    for index, piece in enumerate(pieces):
        if (match := matcher.append(piece)) is not None:
            return index, match
    return None


@pytest.mark.parametrize(
    ("strings", "pieces", "want"),
    [
        (["stop"], [b"a st", b"o", b"p now"], (2, "stop")),
        (["stop"], [b"sto", b"sto", b"p"], (2, "stop")),
        (["stop"], [b"st", b"op"], (1, "stop")),
        (["b", "abc"], [b"abc"], (0, "abc")),
        (["ab", "abc"], [b"abc"], (0, "abc")),
        (["\u20ac"], [b"a", b"\xe2", b"\x82", b"\xac", b"b"], (3, "\u20ac")),
        (["x"], [b"\xf0", b"\x9f", b"x"], (2, "x")),
        ([": "], [b":", b" \xf0\x9f\x98", b"\x80"], (1, ": ")),
        (["nope"], [b"n", b"op"], None),
        (["", "z"], [b"a", b"z"], (1, "z")),
    ],
)
def test_stop_strings(strings, pieces, want):
    assert first_match(strings, pieces) == want


def test_a_string_behind_bytes_that_never_become_a_character():
    matcher = StopStringMatcher(["x"], decode)
    assert [matcher.append(b"\xff") for _ in range(200)] == [None] * 200
    assert matcher.append(b"x") == "x"


def condition(**changes):
    settings = {
        "max_output_tokens": 5,
        "min_tokens": 0,
        "stop_token_ids": frozenset({b"!"}),
        "stop_strings": ("ab",),
        "detokenize": decode,
    }
    return StopCondition(**(settings | changes))


def test_cut_keeps_the_token_that_ends_the_output():
    assert condition().cut([b"x", b"!", b"y"]) == (2, Stop(FinishReason.STOP, b"!"))
    assert condition().cut([b"a", b"b", b"y"]) == (2, Stop(FinishReason.STOP, "ab"))
    assert condition().cut([b"x"] * 9) == (5, Stop(FinishReason.LENGTH))
    assert condition().cut([b"x", b"x"]) == (2, None)


def test_nothing_is_kept_where_no_token_was_asked_for():
    assert condition(max_output_tokens=0).cut([]) == (0, None)
    assert condition(max_output_tokens=0).cut([b"!"]) == (0, Stop(FinishReason.LENGTH))


def test_stop_on_the_last_allowed_token_counts_as_stop():
    assert condition().cut([b"x"] * 4 + [b"!"]) == (5, Stop(FinishReason.STOP, b"!"))


def test_string_completed_before_min_tokens_never_counts():
    assert condition(min_tokens=3).cut([b"a", b"b", b"c", b"d"]) == (4, None)
    assert condition(min_tokens=3).cut([b"a", b"b", b"a", b"b"]) == (
        4,
        Stop(FinishReason.STOP, "ab"),
    )


def test_early_match_does_not_count_later_either():
    """The text kept for a long stop string still holds the short one that came too early."""
    stop = condition(min_tokens=3, stop_strings=("a", "longer string"))
    assert stop.cut([b"a", b"b", b"c", b"d"]) == (4, None)


def test_result_does_not_depend_on_how_tokens_are_grouped():
    tokens = [b"x", b"a", b"a", b"b", b"y"]
    whole = condition().cut(tokens)
    single = condition()
    for index, token in enumerate(tokens):
        if (stop := single.append(token)) is not None:
            assert (index + 1, stop) == whole
            return
    raise AssertionError("no stop was found")

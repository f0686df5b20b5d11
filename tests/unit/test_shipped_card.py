"""The shipped draft's card says what was recorded and measured."""

from __future__ import annotations

import pytest

from tests.shipped_card import FOLDER, extrapolated, in_the_engine, recorded_points, with_part

CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
MODES = ("sync", "local", "chain", "split")


def report(same_text=1.0, **changed):
    return {
        "options": {"questions": 80, "tokens": 64, "draft_tokens": 3} | changed,
        "rows": [
            {
                "mode": mode,
                "temperature": temperature,
                "tokens_per_step": 1.5 + place / 8 - temperature / 16,
                "same_text": same_text,
            }
            for temperature in (0.0, 1.0)
            for place, mode in enumerate(MODES)
        ],
    }


def test_the_extrapolation_is_that_of_the_recorded_points():
    assert with_part(CARD, "extrapolation", extrapolated(recorded_points())) == CARD


def test_a_report_fills_its_part_and_no_other():
    part = in_the_engine(report())
    filled = with_part(CARD, "figures in the engine", part)
    assert "each of the 80 first questions" in filled
    assert "| both, verified together | 1.750 | 1.688 |" in filled
    assert filled.partition("<!-- figures")[0] == CARD.partition("<!-- figures")[0]
    assert filled.partition("<!-- end of figures")[2] == CARD.partition("<!-- end of figures")[2]


@pytest.mark.parametrize(
    "bad", [report(questions=40), report(tokens=2), report(draft_tokens=5), report(same_text=0.99)]
)
def test_another_report_is_refused(bad):
    with pytest.raises(ValueError, match=r"the card wants|plain decoding"):
        in_the_engine(bad)

from __future__ import annotations

import pytest

from cluster.draft_curve import (
    EARLIER,
    CurvePoint,
    LogLinear,
    draw_curve,
    extrapolation,
    tokens_per_round,
)


def points(*seen):
    return [
        CurvePoint(count, (share, share), {1: 1 + share, 2: 1 + share + share**2}, 1.5)
        for count, share in seen
    ]


LINE = points((0, 0.1), (1000, 0.2), (2000, 0.25), (8000, 0.35))


def test_points_on_a_line_give_that_line():
    line = LogLinear.fit(LINE)
    assert line.per_doubling == pytest.approx(0.05)
    assert line.acceptance_at(1000) == pytest.approx(0.2)
    assert line.acceptance_at(64_000) == pytest.approx(0.5)


def test_nothing_is_accepted_that_cannot_be_drafted():
    line = LogLinear.fit(LINE, ceiling=0.4)
    assert line.acceptance_at(1e9) == 0.4
    assert line.acceptance_at(1) == 0.0


@pytest.mark.parametrize("few", [LINE[:1], LINE[:2], [LINE[1], LINE[1]]])
def test_one_point_is_no_line(few):
    assert LogLinear.fit(few) is None
    assert not list(extrapolation(few, 1.0))


def test_a_round_of_equal_chances():
    assert tokens_per_round(0.0, 3) == 1
    assert tokens_per_round(0.5, 3) == 1.875
    assert tokens_per_round(1.0, 3) == 4


def test_the_earlier_head_is_extrapolated_as_it_was():
    # What its own report gave for 4.5 and 100 million tokens.
    assert EARLIER.acceptance_at(4.5e6) == pytest.approx(0.43, abs=0.01)
    assert EARLIER.length_at(4.5e6, 3) == pytest.approx(1.7, abs=0.02)
    assert EARLIER.acceptance_at(1e8) == pytest.approx(0.56, abs=0.01)
    assert EARLIER.length_at(1e8, 3) == pytest.approx(2.05, abs=0.02)


def test_a_card_calls_it_extrapolated():
    head, *_, last = extrapolation(LINE, 1.0)
    assert head.startswith("**Extrapolated, not measured:**")
    assert "+0.050 a doubling" in head
    assert last.startswith("| 128 k | 0.55 | ")


@pytest.mark.parametrize("some", [LINE, LINE[:1], LINE[:2]])
def test_every_curve_has_a_picture(tmp_path, some):
    pytest.importorskip("matplotlib")
    assert draw_curve(some, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000

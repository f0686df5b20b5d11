from __future__ import annotations

import json
from itertools import count

import pytest

from cluster.draft_curve import CurvePoint
from cluster.live_curve import LiveCurve


def write(folder, num_points, ending=""):
    rows = [
        {
            "num_tokens": 1000 * point,
            "quality": {
                "acceptance": [0.2 + 0.05 * point, 0.3],
                "mean_acceptance_length": [1.2, 1.3],
                "tree_acceptance_length": 1.4,
                "coverage": 0.9,
            },
        }
        for point in range(num_points)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "curve.jsonl").write_text(text + ending)


@pytest.fixture
def drawn(monkeypatch):
    pictures = []
    monkeypatch.setattr("cluster.live_curve.draw_curve", lambda *drawn: pictures.append(drawn))
    return pictures


def test_every_new_point_is_drawn_and_every_line_passed_on(tmp_path, drawn):
    seconds, told = count(0, 60), []
    curve = LiveCurve(tmp_path, told.append, lambda: float(next(seconds)))
    curve("answers")
    assert not drawn
    write(tmp_path, 2)
    curve("step 4")
    [(points, path, ceiling)] = drawn
    assert points[1] == CurvePoint(1000, (0.25, 0.3), {1: 1.2, 2: 1.3}, 1.4)
    assert (path, ceiling) == (tmp_path / "curve.png", 0.9)
    curve("nothing new")
    assert len(drawn) == 1
    # The second half of a line comes later.
    write(tmp_path, 3, ending='{"num_tok')
    curve("step 8")
    assert len(drawn) == 2
    assert len(drawn[1][0]) == 3
    assert told == ["answers", "step 4", "nothing new", "step 8"]


def test_pictures_are_rare(tmp_path, drawn):
    seconds = count(0, 1)
    curve = LiveCurve(tmp_path, lambda _: None, lambda: float(next(seconds)))
    write(tmp_path, 2)
    for _ in range(19):
        curve("soon after the start")
    assert not drawn
    curve("later")
    assert len(drawn) == 1


@pytest.mark.parametrize("content", ['{"num_tokens": 4}\n', "no json\n"])
def test_a_curve_that_cannot_be_drawn_is_told_and_nothing_ends(tmp_path, drawn, content):
    seconds, told = count(0, 60), []
    curve = LiveCurve(tmp_path, told.append, lambda: float(next(seconds)))
    (tmp_path / "curve.jsonl").write_text(content)
    curve("step 4")
    curve("step 8")
    assert told[0].startswith("warning: curve.png is not drawn: ")
    assert told[1:] == ["step 4", "step 8"]
    assert not drawn

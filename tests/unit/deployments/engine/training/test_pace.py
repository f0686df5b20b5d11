from __future__ import annotations

from deployments.engine.training.pace import Pace


def paced(total, done=0):
    now, lines = [100.0], []
    return Pace("texts", total, lines.append, done=done, clock=lambda: now[0]), now, lines


def test_a_line_every_ten_seconds_and_one_at_the_end():
    pace, now, lines = paced(total=8)
    for _ in range(8):
        now[0] += 4.0
        pace.advance(20)
    assert lines == [
        "texts: 3 of 8, 5 tokens/s, about 20 s left",
        "texts: 6 of 8, 5 tokens/s, about 8 s left",
        "texts: 8 of 8, 5 tokens/s",
    ]


def test_what_was_done_before_says_nothing_about_speed():
    pace, now, lines = paced(total=1000, done=500)
    now[0] += 10.0
    pace.advance(100, note="loss 3.1")
    assert lines == ["texts: 501 of 1000, loss 3.1, 10 tokens/s, about 83 min left"]

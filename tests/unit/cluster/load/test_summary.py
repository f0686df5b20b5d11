"""The figures of a run, on outcomes whose figures are known."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from cluster.load.outcome import Outcome
from cluster.load.plot import draw
from cluster.load.summary import Slo, summarise, timeline


def answered(index, due_s, first_s, num_tokens=11, token_s=0.1):
    return Outcome(
        index=index,
        surface="http",
        due_s=due_s,
        sent_s=due_s + 0.01,
        event_s=[due_s + first_s + token_s * number for number in range(num_tokens)],
        ended_s=due_s + first_s + token_s * num_tokens,
        num_prompt_tokens=5,
        num_output_tokens=num_tokens,
        num_cached_tokens=2,
        ending="complete",
    )


def lost(index, due_s, ending):
    return Outcome(
        index=index, surface="http", due_s=due_s, sent_s=due_s, ending=ending, error="why"
    )


OUTCOMES = [
    answered(0, 0.0, 0.5),
    answered(1, 1.0, 3.0),
    answered(2, 1.5, 0.5, token_s=0.3),
    lost(3, 4.0, "rejected"),
    lost(4, 4.5, "failed"),
]


def test_rejected_requests_are_failures_and_slow_ones_are_not_good():
    summary = summarise(OUTCOMES, Slo(ttft_s=1, tpot_s=0.2), seconds=10)
    assert (summary.num_requests, summary.num_complete) == (5, 3)
    assert (summary.num_failed, summary.num_rejected) == (2, 1)
    assert summary.num_good == 1
    assert summary.goodput_share == pytest.approx(0.2)
    assert summary.goodput_rps == pytest.approx(0.1)
    assert summary.output_tokens_per_s == pytest.approx(3.3)
    assert summary.num_cached_tokens == 6
    assert summary.errors == {"why": 2}


def test_waiting_counts_from_when_a_request_was_due():
    summary = summarise(OUTCOMES[:3], Slo(), seconds=10)
    assert summary.ttft_s.percentiles["p50"] == pytest.approx(0.5)
    assert summary.ttft_s.percentiles["p99"] == pytest.approx(3.0)
    assert summary.ttft_s.mean == pytest.approx(4 / 3)
    assert summary.tpot_s.percentiles["p50"] == pytest.approx(0.1)
    assert summary.gap_s.percentiles["p99"] == pytest.approx(0.3)
    assert summary.lateness_s.mean == pytest.approx(0.01)


def test_without_an_answer_there_are_no_percentiles():
    summary = summarise(OUTCOMES[3:], Slo(), seconds=1)
    assert summary.num_good == 0
    assert summary.ttft_s.mean is None
    assert summary.ttft_s.percentiles == {}


def test_intervals_without_requests_are_told_too():
    steps = timeline(OUTCOMES, Slo(ttft_s=1), step_s=1.0)
    assert [step["due"] for step in steps] == [1, 2, 0, 0, 2]
    assert [step["good"] for step in steps] == [1, 1, 0, 0, 0]
    assert [step["failed"] for step in steps] == [0, 0, 0, 0, 2]
    assert steps[2]["ttft_s"] is None


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report = {
        "slo": {"ttft_s": 1.0},
        "all": asdict(summarise(OUTCOMES, Slo(), seconds=10)),
        "timeline": timeline(OUTCOMES, Slo(), step_s=1.0),
        "replicas": [{"at_s": 0.0, "replicas": {"Target": 1}}, {"at_s": 1.0, "replicas": {}}],
    }
    assert draw(report, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

"""Which rows of a report the bars of ``make bench-ttft`` are about, and when they hold."""

import pytest

from tests.bench.ttft.bars import hold_bars
from tests.bench.ttft.measure import _mix, _num_hit_pages
from tests.bench.ttft.replica import TAIL_TOKENS, make_prompt


def row(source, tokens, hits, of_cold):
    return {"source": source, "tokens": tokens, "hits": hits, "of_cold": of_cold}


def bars(rows, of_undisturbed=1.0):
    return hold_bars({"ttft": rows, "neighbours": {"of_undisturbed": of_undisturbed}})


@pytest.mark.parametrize(
    ("measured", "holds"),
    [
        (row("valkey", 4096, 1.0, 0.1), True),
        (row("valkey", 4096, 1.0, 0.11), False),
        (row("ssd", 4096, 1.0, 0.15), True),
        (row("ssd", 4096, 1.0, 0.16), False),
        (row("peers", 1024, 0.0, 1.03), True),
        (row("valkey", 7168, 0.0, 1.04), False),
    ],
)
def test_a_bar_holds_up_to_its_value(measured, holds):
    about, beside = bars([measured]).values()
    assert (about["holds"], beside["holds"]) == (holds, True)


def test_other_rows_have_no_bar():
    rows = [
        row("valkey", 4096, 0.5, 9.0),
        row("valkey", 1024, 1.0, 9.0),
        row("peers", 4096, 1.0, 9),
    ]
    assert len(bars(rows)) == 1


def test_decoding_beside_loads():
    [beside] = bars([], 0.89).values()
    assert not beside["holds"]


def test_prompts_have_the_hits_they_should_and_no_more():
    prompt = make_prompt(1024, 1)
    assert len(prompt) == 1024 + TAIL_TOKENS
    for hits, pages in ((0.0, 0), (0.5, 8), (0.8, 13), (1.0, 16)):
        mixed = _mix(prompt, hits, 2)
        assert len(mixed) == len(prompt)
        assert _num_hit_pages(prompt, hits) == pages
        assert mixed[: 64 * pages] == prompt[: 64 * pages]
        if pages < 16:
            assert mixed[64 * pages : 64 * (pages + 1)] != prompt[64 * pages : 64 * (pages + 1)]

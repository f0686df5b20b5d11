"""The demo's judgement: every expectation can fail, and is named when it does."""

import copy

import pytest

from cluster.demo.expectations import EXPECTATIONS, broken_expectations

GOOD = {
    "model": "m",
    "http": {"text": "a"},
    "grpc": {"text": "a"},
    "identical": True,
    "speculation": {
        "on_equals_off": True,
        "pool_accepted_tokens": 3,
        "table_hits": 5,
        "mean_acceptance_length": 1.2,
    },
    "kv": {
        "first_replica": "a",
        "second_replica": "b",
        "second_replica_cached_tokens": 512,
        "same_text": True,
        "valkey_pages": 9,
        "ssd_pages": 9,
    },
    "ttft_ms": {"cold": 900.0, "warm": 200.0},
    "processes_left": 0,
}

BAD = {
    "http.text": "",
    "grpc.text": "",
    "identical": False,
    "speculation.on_equals_off": False,
    "speculation.pool_accepted_tokens": 0,
    "speculation.table_hits": 0,
    "speculation.mean_acceptance_length": 1.0,
    "kv.first_replica": "b",
    "kv.second_replica_cached_tokens": 511,
    "kv.same_text": False,
    "kv.valkey_pages": 0,
    "kv.ssd_pages": 0,
    "ttft_ms.cold": 100.0,
    "processes_left": 1,
}


def test_a_good_report_breaks_nothing():
    assert broken_expectations(GOOD) == []


@pytest.mark.parametrize(("field", "value"), BAD.items())
def test_a_bad_figure_is_named(field, value):
    report = copy.deepcopy(GOOD)
    *parents, last = field.split(".")
    holder = report
    for name in parents:
        holder = holder[name]
    holder[last] = value
    [broken] = broken_expectations(report)
    assert broken.startswith(field)


def test_every_expectation_is_tried_above():
    assert len(BAD) == len(EXPECTATIONS)

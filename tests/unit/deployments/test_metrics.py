from __future__ import annotations

import re

import pytest

from deployments.metrics import ALL_METRICS, Metric


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_names_say_their_unit(metric: Metric) -> None:
    assert re.fullmatch(r"paceline_[a-z_]+", metric.name)
    if metric.boundaries:
        assert metric.name.endswith("_seconds")
        assert list(metric.boundaries) == sorted(metric.boundaries)
    assert metric.description.endswith(".")


def test_names_are_unique() -> None:
    names = [metric.name for metric in ALL_METRICS]
    assert len(set(names)) == len(names)

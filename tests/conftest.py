"""Command-line options of the tests, and what no test leaves to the next one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# No test asserts on time. A change is judged by the same examples as the change before it.
settings.register_profile(
    "paceline",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="EXPLORE" not in os.environ,
)
settings.load_profile("paceline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kuberay-crds",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data" / "kuberay-crds",
        help="folder with CRDs of KubeRay and others, for a strict check of the rendered chart",
    )


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """An engine that a test builds in its own process sets torch's threads, and so sums' bits."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)

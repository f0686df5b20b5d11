"""Command-line options of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import pytest

# No test asserts on time.
settings.register_profile("paceline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paceline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kuberay-crds",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data" / "kuberay-crds",
        help="folder with KubeRay's CRD manifests, for a strict check of the rendered chart",
    )

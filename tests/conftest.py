"""Command-line options of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kuberay-crds",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data" / "kuberay-crds",
        help="folder with KubeRay's CRD manifests, for a strict check of the rendered chart",
    )

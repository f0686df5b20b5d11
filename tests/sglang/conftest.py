"""What the tests of this folder share, the order of a module's tests among it.

An engine takes a minute to start, so a module has one or two, and its last tests break them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.sglang.dense_model import write_dense_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def receiver() -> Iterator[OtlpReceiver]:
    """Of the spans of all clusters that are told its endpoint."""
    with otlp_receiver() as receiver:
        yield receiver


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """After they were shuffled."""
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    ordered: Sequence[pytest.Function] = sorted(
        (items[place] for place in places),
        key=lambda item: (item.path, item.function.__code__.co_firstlineno),
    )
    for place, item in zip(places, ordered, strict=True):
        items[place] = item

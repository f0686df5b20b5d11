"""Keeps the tests of a module here in the order in which they are written.

An engine takes a minute to start, so a module has one or two, and its last tests break them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent


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

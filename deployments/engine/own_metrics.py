"""Figures that an engine keeps of its own accord, in its own names, for those who know them."""

from __future__ import annotations

from typing import NamedTuple


class Sample(NamedTuple):
    """One figure.

    Attributes:
        name: in Prometheus' characters.
        labels: pairs of name and value, in order of their names.
        value: in the unit that the name says.
        is_total: whether it is a counter; its name ends in ``_total`` then.
    """

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float
    is_total: bool

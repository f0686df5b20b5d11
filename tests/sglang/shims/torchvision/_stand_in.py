"""Classes that have every attribute and do nothing."""

from __future__ import annotations


class _HasEverything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _HasEverything(name, (), {})

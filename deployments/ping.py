"""The question of a health check, as it travels through the router to one target replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Does your engine make progress?

    Attributes:
        avoid_replicas: target replicas whose answer is known.
    """

    avoid_replicas: tuple[str, ...] = ()

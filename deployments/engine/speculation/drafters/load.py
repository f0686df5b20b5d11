"""Drafters by name: a built-in one, or any class or factory as ``package.module:Name``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.errors import DrafterLoadError

if TYPE_CHECKING:
    from collections.abc import Callable


def load_drafter(spec: str) -> Drafter:
    """Build the drafter a configuration names.

    Args:
        spec: "suffix", or "module:name" of something that is called without arguments and returns
            a ``Drafter``. The module runs with the rights of the replica: name only what you trust.

    Raises:
        DrafterLoadError: it cannot be imported or built, or is not a ``Drafter``.
    """
    factory = find_factory(spec)
    try:
        drafter = factory()
    except Exception as error:
        raise DrafterLoadError(f"drafter {spec!r} cannot be built: {error!r}") from error
    if not isinstance(drafter, Drafter):
        raise DrafterLoadError(f"drafter {spec!r} built a {type(drafter).__name__}, not a Drafter")
    return drafter


def find_factory(spec: str) -> Callable[[], object]:
    """What builds the drafter a configuration names; its module is imported, nothing is built.

    Args:
        spec: as for ``load_drafter``.

    Raises:
        DrafterLoadError: it cannot be imported, or cannot be called.
    """
    if spec == "suffix":
        # It brings a compiler along, which a replica without it can do without.
        from deployments.engine.speculation.drafters.suffix import SuffixDrafter

        return SuffixDrafter
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise DrafterLoadError(f'drafter {spec!r} is neither "suffix" nor "module:name"')
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise DrafterLoadError(f"drafter {spec!r} cannot be imported: {error!r}") from error
    if not callable(factory):
        raise DrafterLoadError(f"drafter {spec!r} is not a class or a function")
    return cast("Callable[[], object]", factory)

"""Model families: one file each, named after the ``model_type`` of their ``config.json``.

A family's file defines ``Model``, a class with the constructor, ``forward`` and ``weight_targets``
of ``models.llama.Model``. Nothing else has to know of it.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from deployments.engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from deployments.engine.torch_engine.models.llama import Model


def supported_model_types() -> tuple[str, ...]:
    """The families that can be run."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


def model_class(model_type: str) -> type[Model]:
    """The class of a family.

    Raises:
        UnsupportedModelError: there is no such family.
    """
    known = supported_model_types()
    if model_type not in known:
        raise UnsupportedModelError(f"model type {model_type!r}; known are {', '.join(known)}")
    found: type[Model] = import_module(f"{__name__}.{model_type}").Model
    return found

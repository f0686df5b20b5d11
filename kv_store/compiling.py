"""Compiling a loop to machine code, once per machine where a cache can be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile at the first call, to run without the interpreter's lock.

    Division follows IEEE, nothing is reordered or contracted. The machine code is kept beside the
    source or in the user's cache folder; a container that can write to neither compiles anew. A
    cached function is compiled again only if its own file changes.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(**options)(function)  # type: ignore[no-any-return]

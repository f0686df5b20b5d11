"""How the kernels of this package are compiled, and where the machine code is kept."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

if TYPE_CHECKING:
    from collections.abc import Callable


def _code_folder() -> Path:
    """One folder per state of the sources.

    Numba compares only the file a function stands in, and would go on using machine code whose
    callees have changed.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(base) if base else Path.home() / ".cache") / "paceline" / "kernels"
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache / digest.hexdigest()


_FOLDER = str(_code_folder())


def machine() -> str:
    """What the code is compiled for; other machines may round otherwise."""
    return f"{get_host_cpu_name()} {get_host_cpu_features().flatten()}"


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, without the interpreter's lock, and keep the machine code.

    Sums may be reordered by the compiler, but one kernel does it alike for every row, so a row's
    value does not depend on what is computed beside it.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _FOLDER
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write: compile anew in every process
        compiled = numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled

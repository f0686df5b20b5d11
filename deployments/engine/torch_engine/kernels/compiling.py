"""How the kernels of this package are compiled, and where the machine code is kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_WAIT_S = 300.0
_POLL_S = 0.1


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


def code_file(name: str) -> Path | None:
    """A file beside the machine code; None where nothing can be written."""
    folder = Path(_FOLDER)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder / name
    return None


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


@contextlib.contextmanager
def first_call() -> Iterator[None]:
    """Around calls that may have to compile: one process of this user does, others wait for it.

    Replicas of a cluster start together; each would compile the same code for a minute or two.
    """
    lock = -1
    # Nowhere to write, or nobody done for minutes: then everybody compiles.
    path = code_file("lock")
    with contextlib.suppress(OSError):  # the file may be another user's
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else -1
    gives_up_at = time.monotonic() + _MAX_WAIT_S
    while lock >= 0 and time.monotonic() < gives_up_at and not _is_locked(lock):
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

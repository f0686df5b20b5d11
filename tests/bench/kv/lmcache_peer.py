"""LMCache's native RESP client, straight from its wheel: the library alone needs no CUDA."""

from __future__ import annotations

import importlib.util
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.bench.peer_environments import unpacked_wheel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VERSION = "0.5.6"
_TIMEOUT_S = 60.0


class LMCacheClient:
    """Batches of GET into the caller's buffers."""

    def __init__(self, library: Any, host: str, port: int, password: str, num_workers: int) -> None:
        self._client = library.LMCacheRedisClient(host, port, num_workers, "", password)
        self._poll = select.poll()
        self._poll.register(self._client.event_fd(), select.POLLIN)

    def get(self, names: Sequence[str], buffers: Sequence[memoryview]) -> None:
        """Fill the buffers.

        Raises:
            RuntimeError: a page did not come.
        """
        self._client.submit_batch_get(list(names), list(buffers))
        if not self._poll.poll(_TIMEOUT_S * 1000):
            raise RuntimeError("no answer")
        for _, is_good, error, _ in self._client.drain_completions():
            if not is_good:
                raise RuntimeError(str(error))

    def close(self) -> None:
        """Stop its threads."""
        self._client.close()


def load_library() -> Any | None:
    """The compiled module, downloaded once; None where its wheel cannot be had or loaded."""
    import torch  # noqa: F401 - its libraries must be there before the module asks for them

    try:
        path = _library_path()
        spec = importlib.util.spec_from_file_location("lmcache_redis", path)
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, ImportError, ValueError, subprocess.CalledProcessError) as exc:
        sys.stderr.write(f"LMCache {VERSION} is not measured: {exc}\n")
        return None
    return module


def _library_path() -> Path:
    [path] = unpacked_wheel("lmcache", VERSION, only="lmcache_redis").rglob("lmcache_redis*.so")
    return path

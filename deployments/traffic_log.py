"""Keeps the conversations of tenants that consented, for drafts to be trained on.

A line is what ``paceline train draft --prompts`` reads, ``{"messages": [...]}``, and nothing else:
no answer, key, tenant, time or request id. Each tenant has a folder of its own, so what one tenant
said can be deleted, or trained on, alone. The folder is bounded; the oldest files go first.
"""

from __future__ import annotations

import json
import logging
import os
import time
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from deployments.config import TrafficLogConfig
    from deployments.tokenizer import ChatTurn

logger = logging.getLogger(__name__)

_MAX_QUEUED_CHARS = 16 << 20
_CHARS_BESIDE_CONTENT = 1_024
"""Of each message: what it takes in memory however short it is."""
_FILES_PER_TENANT = 8
"""What is forgotten at once is one file: an eighth of a tenant's bytes."""
_CLOSE_TIMEOUT_S = 2.0


class TrafficLog:
    """Writes on a thread of its own; a request never waits for it, nor fails by it.

    Args:
        config: who consented, and where their prompts are kept.
        on_result: called with ``kept`` or ``dropped`` for each prompt of theirs, from any thread.
    """

    def __init__(self, config: TrafficLogConfig, on_result: Callable[[str], None]) -> None:
        self._config = config
        self._on_result = on_result
        self._queue: SimpleQueue[tuple[str, tuple[ChatTurn, ...]] | None] = SimpleQueue()
        self._lock = Lock()
        self._num_queued_chars = 0
        self._files: dict[str, _TenantFile] = {}
        self._thread = Thread(target=self._write, name="traffic-log", daemon=True)
        if config.tenants:
            self._thread.start()

    def record(self, tenant: str, turns: Sequence[ChatTurn]) -> None:
        """Keep a conversation, if its tenant consented and the writer keeps up."""
        if tenant not in self._config.tenants:
            return
        # A line has at least a byte for each character; how many more, the writer finds out.
        is_short = sum(len(turn.content) for turn in turns) <= _longest_line(self._config)
        if is_short and self._take_room(turns):
            self._queue.put((tenant, tuple(turns)))
        else:
            self._on_result("dropped")

    def close(self) -> None:
        """Write what is queued, within two seconds."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _take_room(self, turns: Sequence[ChatTurn]) -> bool:
        size = _queued_chars(turns)
        with self._lock:
            if self._num_queued_chars + size > _MAX_QUEUED_CHARS:
                return False
            self._num_queued_chars += size
        return True

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            tenant, turns = item
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            line = json.dumps({"messages": messages}).encode() + b"\n"
            try:
                kept = self._file_of(tenant).append(line)
            except OSError as error:
                logger.warning("a prompt of %s is not kept: %s", tenant, error.strerror)
                kept = False
            self._on_result("kept" if kept else "dropped")
            with self._lock:
                self._num_queued_chars -= _queued_chars(turns)
        for file in self._files.values():
            file.close()

    def _file_of(self, tenant: str) -> _TenantFile:
        if tenant not in self._files:
            folder = self._config.folder
            if folder is None:
                raise ValueError("a traffic log without a folder")
            self._files[tenant] = _TenantFile(folder / tenant, self._config)
        return self._files[tenant]


def _longest_line(config: TrafficLogConfig) -> int:
    return config.max_tenant_bytes // _FILES_PER_TENANT


def _queued_chars(turns: Sequence[ChatTurn]) -> int:
    return sum(_CHARS_BESIDE_CONTENT + len(turn.content) for turn in turns)


class _TenantFile:
    """The file that a tenant's next prompts go to. Each process writes files of its own."""

    def __init__(self, folder: Path, config: TrafficLogConfig) -> None:
        self._folder = folder
        self._max_bytes = config.max_tenant_bytes
        self._longest = _longest_line(config)
        self._descriptor: int | None = None
        self._num_bytes = 0

    def append(self, line: bytes) -> bool:
        """Returns: False if it is longer than a file may be, or than what the disk has left."""
        if len(line) > self._longest:
            return False
        if self._descriptor is None or self._num_bytes + len(line) > self._longest:
            self._begin()
        if self._descriptor is None:
            return False
        # One call: who reads meanwhile sees whole lines.
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, self._num_bytes)  # or the next line would follow a half
            return False
        self._num_bytes += len(line)
        return True

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _begin(self) -> None:
        self.close()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The new file may grow to its full size, so room is made for all of it.
        room = self._max_bytes - self._longest
        for path in sorted(self._folder.glob("*.jsonl"), reverse=True):
            room -= path.stat().st_size
            if room < 0:
                path.unlink(missing_ok=True)
        path = self._folder / f"{time.time_ns():020d}-{os.getpid()}.jsonl"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._num_bytes = 0

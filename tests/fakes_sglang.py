"""A SGLang that says what a test wants, in the words of the real one."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from deployments.engine.sglang_engine.runtime import Load

if TYPE_CHECKING:
    from kv_store import PageStoreStats


def item(*token_ids: int, finish: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    """One item of a generation."""
    return {
        "text": "",
        "output_ids": list(token_ids),
        "meta_info": {"finish_reason": finish, "cached_tokens": 0, "num_retractions": 0, **meta},
    }


class FakeRuntime:
    """Plays scripts, one per generation; behind a script's end it says nothing more."""

    def __init__(self, *scripts: list[dict[str, Any] | Exception]) -> None:
        self._scripts = deque(scripts)
        self._aborts: dict[str, asyncio.Event] = {}
        self.arguments: list[dict[str, Any]] = []
        self.num_unfinished = 0
        self.dead: str | None = None
        self.pages: PageStoreStats | None = None
        self.owners: dict[str, str] = {}
        self.is_closed = False

    async def generate(self, arguments):
        self.arguments.append(arguments)
        self.num_unfinished += 1
        abort = self._aborts[arguments["rid"]] = asyncio.Event()
        for entry in self._scripts.popleft():
            await asyncio.sleep(0)
            if isinstance(entry, Exception):
                raise entry
            if entry["meta_info"]["finish_reason"] is not None:
                self.num_unfinished -= 1
            yield entry
        await abort.wait()
        self.num_unfinished -= 1
        yield item(finish={"type": "abort", "message": "Aborted", "status_code": None})

    def abort(self, rid):
        self._aborts[rid].set()

    def load(self):
        return Load(
            num_running=len(self._aborts), num_waiting=3, num_total_tokens=640, num_used_tokens=100
        )

    def dead_process(self):
        return self.dead

    def page_store_stats(self):
        return self.pages

    def owner(self, salt, tenant):
        self.owners[salt] = tenant

    def held_prefixes(self):
        return {}

    def own_metrics(self):
        return []

    def close(self):
        self.is_closed = True

"""Which pages SGLang holds, by the names that routers use, learned from its KV events.

SGLang names a page by a hash of its own and tells with each new page its tokens, the page before
it and the salt of whom it belongs to. A page lies on the GPU, in host memory, or in both.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.engine.prefixes import (
    MAX_PAGES,
    MAX_REPORTED,
    PAGE_TOKENS,
    Report,
    page_name,
    report,
    root_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MAX_HELD = 65_536
_MAX_OWNERS = 65_536


class _Page(NamedTuple):
    name: int
    depth: int
    media: frozenset[str]


class HeldPages:
    """Pages that events told of. Thread-safe.

    The oldest are forgotten beyond a bound; from then on, and after lost events, a page that is
    not known may be held all the same, until SGLang empties its memory.
    """

    def __init__(self, max_held: int = _MAX_HELD, max_owners: int = _MAX_OWNERS) -> None:
        """Start empty.

        Args:
            max_held: pages remembered, at most.
            max_owners: salts remembered, at most.
        """
        self._max_held = max_held
        self._max_owners = max_owners
        self._lock = threading.Lock()
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self._is_complete = True
        self._report: Report | None = None

    def __len__(self) -> int:
        return len(self._pages)

    def owner(self, salt: str, tenant: str) -> None:
        """Requests with this salt are this tenant's; to be said before the first one is sent."""
        with self._lock:
            self._owners[salt] = tenant
            self._owners.move_to_end(salt)
            if len(self._owners) > self._max_owners:
                self._owners.popitem(last=False)

    def apply(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Learn from events in their order.

        Args:
            events: SGLang's, as maps; ``type`` names the kind. Unknown kinds are ignored.

        Raises:
            KeyError: an event lacks what its kind has.
        """
        with self._lock:
            for event in events:
                self._report = None
                match event["type"]:
                    case "BlockStored":
                        self._store(event)
                    case "BlockRemoved":
                        self._remove(event["block_hashes"], event.get("medium") or "")
                    case "AllBlocksCleared":
                        self._pages.clear()
                        self._is_complete = True

    def lost(self) -> None:
        """Events were lost: pages may be gone, or held, without a word."""
        with self._lock:
            self._pages.clear()
            self._is_complete = False
            self._report = None

    def report(self) -> Report:
        """For the routers; the newest pages where there are too many."""
        with self._lock:
            if self._report is None:
                names = [page.name for page in self._pages.values()][-MAX_REPORTED:]
                is_whole = self._is_complete and len(names) == len(self._pages)
                self._report = report(names, is_complete=is_whole)
            return self._report

    def _store(self, event: Mapping[str, Any]) -> None:
        if event["block_size"] != PAGE_TOKENS:
            return
        before = self._before(event)
        if before is None:
            return
        name, depth = before
        # With an EAGLE head SGLang's tokens are pairs of one and the next.
        tokens = [token if isinstance(token, int) else token[0] for token in event["token_ids"]]
        for number, block in enumerate(event["block_hashes"]):
            depth += 1
            if depth > MAX_PAGES:
                return
            name = page_name(name, tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS])
            known = self._pages.get(block)
            media = known.media if known is not None else frozenset[str]()
            self._pages[block] = _Page(name, depth, media | {event.get("medium") or ""})
            self._pages.move_to_end(block)
        while len(self._pages) > self._max_held:
            self._pages.popitem(last=False)
            self._is_complete = False

    def _before(self, event: Mapping[str, Any]) -> tuple[int, int] | None:
        """Name and depth of what comes before an event's pages; None if it is not known."""
        parent = event["parent_block_hash"]
        if parent is not None:
            page = self._pages.get(parent)
            return None if page is None else (page.name, page.depth)
        tenant = self._owners.get(event.get("cache_salt") or "")
        return None if tenant is None else (root_name(tenant), 0)

    def _remove(self, blocks: Iterable[int], medium: str) -> None:
        for block in blocks:
            page = self._pages.get(block)
            if page is None:
                continue
            media = page.media - {medium}
            if media:
                self._pages[block] = page._replace(media=media)
            else:
                del self._pages[block]

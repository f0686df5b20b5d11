"""What a drafter remembers of its sessions: KV rows of committed text, in pages, by last use."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from torch import Tensor


@dataclass(slots=True)
class SessionCache:
    """The cached text of one session.

    Attributes:
        token_ids: whose rows are in the pool, from the first prompt token.
        pages: in text order; ``len(pages) * PAGE_TOKENS >= len(token_ids)``.
        slots: [len(pages) * PAGE_TOKENS] int64, the slot of each position.
    """

    token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class SessionCaches:
    """Session caches over a bounded number of pages; the least recently used give way."""

    def __init__(self, num_pages: int, max_sessions: int) -> None:
        self._num_pages = num_pages
        self._max_sessions = max_sessions
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._caches: OrderedDict[int, SessionCache] = OrderedDict()

    @property
    def num_free_pages(self) -> int:
        """Pages no session holds."""
        return len(self._free_pages)

    def __contains__(self, session_id: int) -> bool:
        return session_id in self._caches

    def fits(self, num_tokens: int) -> bool:
        """Whether a text of this length could be cached at all."""
        return _pages_for(num_tokens) <= self._num_pages

    def take(
        self, session_id: int, token_ids: Sequence[int], in_use: Set[int]
    ) -> SessionCache | None:
        """The session's cache, cut back to what it shares with a text and with room for all of it.

        At least the text's last token is left to compute, so that its logits can be had.

        Args:
            session_id: whose cache.
            token_ids: the session's committed text.
            in_use: sessions that must not be evicted for this one.

        Returns:
            None if there is no room beside the sessions in use.
        """
        cache = self._caches.get(session_id)
        held = len(cache.pages) if cache else 0
        wanted = _pages_for(len(token_ids)) - held
        protected = in_use | {session_id}
        if cache is None and not self._evict_down_to(self._max_sessions - 1, protected):
            return None
        if not self._free(wanted, protected):
            return None
        if cache is None:
            cache = self._caches[session_id] = SessionCache()
        self._caches.move_to_end(session_id)
        shared = min(common_prefix(cache.token_ids, token_ids), len(token_ids) - 1)
        del cache.token_ids[shared:]
        if wanted > 0:
            cache.pages += [self._free_pages.pop() for _ in range(wanted)]
            cache.slots = _slots_of(cache.pages)
        return cache

    def drop(self, session_id: int) -> None:
        """Forget a session and free its pages; unknown ids are ignored."""
        cache = self._caches.pop(session_id, None)
        if cache is not None:
            self._free_pages += cache.pages

    def _evict_down_to(self, num_sessions: int, protected: Set[int]) -> bool:
        while len(self._caches) > num_sessions:
            if not self._evict_one(protected):
                return False
        return True

    def _free(self, num_pages: int, protected: Set[int]) -> bool:
        while len(self._free_pages) < num_pages:
            if not self._evict_one(protected):
                return False
        return True

    def _evict_one(self, protected: Set[int]) -> bool:
        oldest = next((known for known in self._caches if known not in protected), None)
        if oldest is None:
            return False
        self.drop(oldest)
        return True


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(first), len(second))
    if list(first[:length]) == list(second[:length]):
        return length
    return next(i for i in range(length) if first[i] != second[i])


def _pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


def _slots_of(pages: Sequence[int]) -> Tensor:
    starts = torch.tensor(pages, dtype=torch.int64).unsqueeze(1) * PAGE_TOKENS
    return (starts + torch.arange(PAGE_TOKENS)).flatten()

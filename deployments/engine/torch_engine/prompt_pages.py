"""A prompt's pages as the event loop sees them: which are there already, which are written by now.

This is what a prefill replica needs besides generating: its prompts are computed for others, who
find the pages in the KV tier by the same names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.types import SamplingParams
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from deployments.engine.torch_engine.kv_transfer import KVTransfer
    from deployments.engine.types import GenerationRequest
    from kv_store.keys import PageKey
    from kv_store.page_store import PageStore

logger = logging.getLogger(__name__)

_LOOK_TIMEOUT_S = 1.0
_SETTLE_TIMEOUT_S = 30.0
"""For requests without a deadline."""
_GRACE_S = 1.0
"""Beyond a deadline that the store itself keeps; only a stalled process takes longer."""


class PromptPages:
    """Asks the pool and the KV tier about pages. Used from the event loop."""

    def __init__(self, transfer: KVTransfer, store: PageStore | None) -> None:
        """Wire up.

        Args:
            transfer: names pages and knows the pool's; its methods for any thread are used.
            store: the KV tier, or None.
        """
        self._transfer = transfer
        self._store = store

    def keys(self, request: GenerationRequest) -> list[PageKey]:
        """Names of the pages that a request can take from a cache: its last token is computed."""
        text = request.prompt_token_ids + request.resumed_output_ids
        return self._transfer.page_keys(request.tenant_key, text[:-1])

    async def count_cached(self, keys: Sequence[PageKey], timeout_s: float) -> int:
        """Leading pages that the pool has, or behind those the tier."""
        num_local = self._transfer.num_local_pages(keys)
        rest = keys[num_local:]
        if not rest or self._store is None:
            return num_local
        found = self._store.find(rest, timeout_s=timeout_s)
        return num_local + await _answered(found, timeout_s)

    async def count_shared(self, keys: Sequence[PageKey]) -> int:
        """Leading pages that all replicas find in the tier."""
        return await self._settled(keys, _LOOK_TIMEOUT_S)

    async def until_shared(self, keys: Sequence[PageKey], deadline: float | None) -> int:
        """The same, once what is queued of them is written or the deadline is near.

        Args:
            keys: of one chain.
            deadline: seconds since the epoch.
        """
        left_s = _SETTLE_TIMEOUT_S if deadline is None else deadline - time.time()
        return await self._settled(keys, max(0.0, left_s))

    async def _settled(self, keys: Sequence[PageKey], timeout_s: float) -> int:
        if self._store is None:
            return 0
        return await _answered(self._store.settle(keys, timeout_s=timeout_s), timeout_s)


def prompt_alone(
    request: GenerationRequest, num_pages: int, num_tier_pages: int
) -> GenerationRequest:
    """The request that computes a text's full pages, and one token that nobody reads.

    Args:
        request: whose text it is.
        num_pages: to compute, at least one.
        num_tier_pages: leading ones that are in the tier.
    """
    text = request.prompt_token_ids + request.resumed_output_ids
    return replace(
        request,
        prompt_token_ids=text[: num_pages * PAGE_TOKENS],
        resumed_output_ids=(),
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0, ignore_eos=True),
        speculation=False,
        capture=None,
        num_tier_pages=num_tier_pages,
    )


async def _answered(future: Future[int], timeout_s: float) -> int:
    try:
        async with asyncio.timeout(timeout_s + _GRACE_S):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        logger.warning("the page store has not answered within its own time limit")
        return 0

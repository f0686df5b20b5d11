"""Many replicas that miss the same chain at once: one computes it, the others wait a little.

Whoever misses pages claims them in the shared tier, for a while. Where another replica was first,
the load waits for the page instead of computing it as well, up to a bound; then, or once the claim
has lapsed because its holder died, it computes. A claim is a hint: no page's bytes depend on it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from kv_store.config import SingleFlightConfig
    from kv_store.keys import PageKey
    from kv_store.tiers.guarded import GuardedTier


class SingleFlight:
    """Claims in one tier. Lives on the store's event loop."""

    def __init__(
        self,
        tier: GuardedTier,
        config: SingleFlightConfig,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Wire up.

        Args:
            tier: shared by the replicas.
            config: how long claims and waits are.
            clock: seconds, monotonic.
            sleep: waits so many seconds.
        """
        self._tier = tier
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self.num_joined = 0
        self.num_in_vain = 0

    def gives_up_at(self, deadline: float) -> float:
        """When a load that begins now waits no longer: half of its time is for what arrives."""
        now = self._clock()
        return now + min(self._config.wait_s, max(0.0, deadline - now) / 2)

    async def wait_for_first(
        self, keys: Sequence[PageKey], gives_up_at: float, *, has_joined: bool = False
    ) -> bool:
        """Wait while another replica computes the first of the missing pages.

        Args:
            keys: the rest of a chain, its first page in no tier a moment ago.
            gives_up_at: on the clock.
            has_joined: whether a page of this chain was waited for, and came.

        Returns:
            Whether it is there now. If not, the caller computes it, mostly as its only one.
        """
        if len(keys) < self._config.min_pages and not has_joined:
            return False
        claimed = await self._tier.claim(keys, self._config.claim_s)
        has_waited = False
        while not claimed[0]:
            if self._clock() + self._config.poll_s > gives_up_at:
                self.num_in_vain += 1
                return False
            has_waited = True
            await self._sleep(self._config.poll_s)
            [is_there] = await self._tier.contains(keys[:1])
            if is_there:
                self.num_joined += 1
                return True
            claimed = await self._tier.claim(keys[:1], self._config.claim_s)
        if has_waited:  # its holder has died, or is slow
            self.num_in_vain += 1
            await self._tier.claim(keys[1:], self._config.claim_s)
        return False

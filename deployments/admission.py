"""How many requests may be in flight at one ingress replica, overall and per tenant."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.errors import RateLimitedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.tenants import Tenant


class AdmissionGate:
    """Counts requests in flight. Used from one event loop."""

    def __init__(self, max_concurrent_requests: int) -> None:
        self._max_concurrent_requests = max_concurrent_requests
        self._by_tenant: Counter[str] = Counter()
        self.num_in_flight = 0

    @contextmanager
    def admit(self, tenant: Tenant) -> Iterator[None]:
        """Hold one place while the block runs.

        Raises:
            RateLimitedError: the tenant is at its bound, or else the ingress.
        """
        limit = tenant.max_concurrent_requests
        if limit is not None and self._by_tenant[tenant.name] >= limit:
            raise RateLimitedError(
                f"Rate limit reached for tenant '{tenant.name}': {limit} concurrent requests."
            )
        if self.num_in_flight >= self._max_concurrent_requests:
            raise RateLimitedError("Too many requests are in flight; try again shortly.")
        self.num_in_flight += 1
        self._by_tenant[tenant.name] += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self._by_tenant[tenant.name] -= 1

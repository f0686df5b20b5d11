"""API keys to tenants, and a tenant's secret for its KV pages."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import blake3

from deployments.errors import AuthenticationError

if TYPE_CHECKING:
    from deployments.config import AuthConfig

_DEFAULT_TENANT = "default"
_BEARER = "bearer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who a request belongs to.

    Attributes:
        tenant_key: 32 secret bytes; KV pages of two keys are never shared.
        max_concurrent_requests: None for no bound of its own.
        priority: lower runs first.
    """

    name: str
    tenant_key: bytes = field(repr=False)
    max_concurrent_requests: int | None = None
    priority: int = 0


def derive_tenant_key(cluster_secret: str, name: str) -> bytes:
    """32 bytes that only holders of the cluster's secret can compute."""
    root = blake3.blake3(
        cluster_secret.encode(), derive_key_context="paceline tenant root 1"
    ).digest()
    return blake3.blake3(name.encode(), key=root).digest()


class TenantDirectory:
    """All tenants of the cluster. Immutable."""

    def __init__(self, config: AuthConfig) -> None:
        secret = config.cluster_secret.get_secret_value()
        self._tenants: tuple[tuple[tuple[bytes, ...], Tenant], ...] = tuple(
            (
                tenant.key_digests,
                Tenant(
                    name=tenant.name,
                    tenant_key=derive_tenant_key(secret, tenant.name),
                    max_concurrent_requests=tenant.max_concurrent_requests,
                    priority=tenant.priority,
                ),
            )
            for tenant in config.tenants
        )
        self._default = Tenant(
            name=_DEFAULT_TENANT, tenant_key=derive_tenant_key(secret, _DEFAULT_TENANT)
        )

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an ``Authorization`` header.

        Every digest of every tenant is compared, each in constant time, so that the answer's
        timing says nothing about how close a guess was.

        Raises:
            AuthenticationError: authentication is on and the key is missing or unknown.
        """
        if not self._tenants:
            return self._default
        if authorization is None or not authorization.lower().startswith(_BEARER):
            raise AuthenticationError(
                "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
            )
        digest = hashlib.sha256(authorization[len(_BEARER) :].strip().encode()).digest()
        found: Tenant | None = None
        for digests, tenant in self._tenants:
            for known in digests:
                if hmac.compare_digest(known, digest):
                    found = tenant
        if found is None:
            raise AuthenticationError("Incorrect API key provided.")
        return found

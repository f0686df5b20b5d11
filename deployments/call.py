"""What every call of either surface goes through before its content is looked at."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind

from deployments.errors import RequestInvalidError
from deployments.generation import CallContext
from deployments.tracing import traceparent_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deployments.admission import AdmissionGate
    from deployments.config import IngressConfig
    from deployments.tenants import TenantDirectory
    from deployments.tracing import Tracing

TIMEOUT_HEADER = "x-paceline-timeout"
"""Seconds until the request's deadline."""
AVOID_HEADER = "x-paceline-avoid-replica"
"""Comma-separated target replica ids that should not serve this request."""
REPLICA_HEADER = "x-paceline-replica"
"""Answer header: the target replica that served the first choice."""

_MAX_AVOIDED = 16


class CallGuard:
    """Authentication, admission, deadline and the root span."""

    def __init__(
        self,
        config: IngressConfig,
        tenants: TenantDirectory,
        gate: AdmissionGate,
        tracing: Tracing,
        model: str,
    ) -> None:
        self._config = config
        self._tenants = tenants
        self._gate = gate
        self._tracing = tracing
        self._model = model

    def authenticate(self, headers: Mapping[str, str]) -> None:
        """Check the API key alone, for calls that generate nothing.

        Raises:
            AuthenticationError: the key is missing or unknown.
        """
        self._tenants.authenticate(headers.get("authorization"))

    @contextmanager
    def call(
        self, surface: str, operation: str, headers: Mapping[str, str]
    ) -> Iterator[CallContext]:
        """Admit one call for as long as the block runs.

        Args:
            surface: ``http`` or ``grpc``.
            operation: OpenTelemetry's ``gen_ai.operation.name``.
            headers: HTTP headers or gRPC metadata, names in lower case.

        Raises:
            AuthenticationError: the key is missing or unknown.
            RateLimitedError: too many calls are in flight.
            RequestInvalidError: a header makes no sense.
        """
        tenant = self._tenants.authenticate(headers.get("authorization"))
        deadline = time.time() + self._timeout_s(headers.get(TIMEOUT_HEADER))
        avoid = [name.strip() for name in headers.get(AVOID_HEADER, "").split(",")]
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "paceline",
            "gen_ai.request.model": self._model,
            "paceline.tenant": tenant.name,
            "paceline.surface": surface,
            "paceline.request_id": headers.get("x-request-id", "")[:128],
        }
        with (
            self._gate.admit(tenant),
            self._tracing.span(
                f"{operation} {self._model}",
                headers.get("traceparent"),
                attributes,
                kind=SpanKind.SERVER,
            ) as span,
        ):
            yield CallContext(
                surface=surface,
                tenant=tenant,
                deadline=deadline,
                traceparent=traceparent_of(span),
                avoid_replicas=tuple(name for name in avoid if name)[:_MAX_AVOIDED],
            )

    def _timeout_s(self, header: str | None) -> float:
        if header is None:
            return min(self._config.default_timeout_s, self._config.max_timeout_s)
        try:
            timeout_s = float(header)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s < math.inf:
            raise RequestInvalidError(
                f"The {TIMEOUT_HEADER} header must be a positive number of seconds.",
                param=TIMEOUT_HEADER,
            )
        return min(timeout_s, self._config.max_timeout_s)

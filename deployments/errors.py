"""One table: what went wrong -> HTTP status, OpenAI error type and code, gRPC status.

SurfaceError
├── RequestInvalidError             a field is missing, malformed or out of range
│   ├── ContextLengthError          prompt longer than the model's context
│   ├── UnsupportedParameterError   a known parameter this server does not implement
│   └── RequestTooLargeError        body or prompt above the configured limit
├── AuthenticationError             no API key, or an unknown one
├── ModelNotFoundError              the model asked for is not served here
├── RouteNotFoundError              no such path
├── MethodNotAllowedError           the path exists, the method does not
├── RateLimitedError                the tenant's or the ingress's bound is reached
├── TargetBusyError                 every target replica is full
├── TargetUnavailableError          no target replica could finish the request
└── RequestCancelledError           the client has gone
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc

from deployments.engine.errors import (
    DeadlineExceededError,
    EngineError,
    EngineGoneError,
    EngineOverloadedError,
    RequestRejectedError,
    WeightsMissingError,
)


class SurfaceError(Exception):
    """Base of every error that a surface raises on purpose.

    Args:
        message: one sentence for the client.
    """

    def __init__(self, message: str, *args: object) -> None:
        super().__init__(message, *args)
        self.message = message

    def __str__(self) -> str:
        return self.message


class RequestInvalidError(SurfaceError):
    """The request itself is wrong.

    Args:
        message: what is wrong.
        param: the field at fault, as a path such as ``messages[0].content``.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param


class ContextLengthError(RequestInvalidError):
    """The prompt does not fit into the model's context."""


class UnsupportedParameterError(RequestInvalidError):
    """A parameter of the API that this server knows and does not implement."""


class RequestTooLargeError(RequestInvalidError):
    """The body or the prompt is larger than the configured limit."""


class AuthenticationError(SurfaceError):
    """The API key is missing or unknown."""


class ModelNotFoundError(SurfaceError):
    """No such model here."""


class RouteNotFoundError(SurfaceError):
    """No such path."""


class MethodNotAllowedError(SurfaceError):
    """The path does not take this method."""


class RateLimitedError(SurfaceError):
    """A bound on concurrent requests is reached.

    Args:
        message: which bound.
        retry_after_s: seconds after which a retry has a chance.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class TargetBusyError(RateLimitedError):
    """Every target replica is full and so is the queue before them."""


class TargetUnavailableError(SurfaceError):
    """No target replica is alive, or too many died under this request."""


class RequestCancelledError(SurfaceError):
    """The client cancelled; nobody reads this answer."""


@dataclass(frozen=True, slots=True)
class ErrorClass:
    """How one kind of error looks from outside.

    Attributes:
        type: OpenAI's error type.
        code: OpenAI's error code, or None.
    """

    http_status: int
    type: str
    code: str | None
    grpc_code: grpc.StatusCode


_INVALID = "invalid_request_error"

ERROR_TABLE: dict[type[Exception], ErrorClass] = {
    RequestInvalidError: ErrorClass(400, _INVALID, None, grpc.StatusCode.INVALID_ARGUMENT),
    ContextLengthError: ErrorClass(
        400, _INVALID, "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT
    ),
    UnsupportedParameterError: ErrorClass(
        400, _INVALID, "unsupported_parameter", grpc.StatusCode.INVALID_ARGUMENT
    ),
    RequestTooLargeError: ErrorClass(
        400, _INVALID, "request_too_large", grpc.StatusCode.INVALID_ARGUMENT
    ),
    AuthenticationError: ErrorClass(
        401, "authentication_error", "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED
    ),
    ModelNotFoundError: ErrorClass(404, _INVALID, "model_not_found", grpc.StatusCode.NOT_FOUND),
    RouteNotFoundError: ErrorClass(404, _INVALID, "not_found", grpc.StatusCode.NOT_FOUND),
    MethodNotAllowedError: ErrorClass(
        405, _INVALID, "method_not_allowed", grpc.StatusCode.UNIMPLEMENTED
    ),
    RateLimitedError: ErrorClass(
        429, "rate_limit_error", "rate_limit_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED
    ),
    TargetBusyError: ErrorClass(
        429, "overloaded_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED
    ),
    TargetUnavailableError: ErrorClass(
        503, "server_error", "target_unavailable", grpc.StatusCode.UNAVAILABLE
    ),
    RequestCancelledError: ErrorClass(499, _INVALID, "cancelled", grpc.StatusCode.CANCELLED),
    SurfaceError: ErrorClass(500, "server_error", None, grpc.StatusCode.INTERNAL),
    RequestRejectedError: ErrorClass(400, _INVALID, None, grpc.StatusCode.INVALID_ARGUMENT),
    EngineOverloadedError: ErrorClass(
        429, "overloaded_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED
    ),
    DeadlineExceededError: ErrorClass(
        504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED
    ),
    WeightsMissingError: ErrorClass(
        503, "server_error", "weights_missing", grpc.StatusCode.FAILED_PRECONDITION
    ),
    EngineGoneError: ErrorClass(
        503, "server_error", "target_unavailable", grpc.StatusCode.UNAVAILABLE
    ),
    EngineError: ErrorClass(500, "server_error", None, grpc.StatusCode.INTERNAL),
}
"""Looked up by the exact type first, then along its bases."""

INTERNAL_ERROR = ErrorClass(500, "server_error", "internal_error", grpc.StatusCode.INTERNAL)
INTERNAL_MESSAGE = "The server had an error while processing the request."


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiError:
    """One error, ready for either surface."""

    kind: ErrorClass
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def body(self) -> dict[str, object]:
        """The OpenAI-shaped JSON body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "code": self.kind.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to this error; ``Retry-After`` in whole seconds."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def describe(error: BaseException) -> ApiError:
    """What a client is told about an error; an unknown one shows nothing of its inside."""
    for base in type(error).__mro__:
        if base in ERROR_TABLE:
            return ApiError(
                kind=ERROR_TABLE[base],
                message=str(error) or base.__name__,
                param=getattr(error, "param", None),
                retry_after_s=getattr(error, "retry_after_s", None),
            )
    return ApiError(kind=INTERNAL_ERROR, message=INTERNAL_MESSAGE)

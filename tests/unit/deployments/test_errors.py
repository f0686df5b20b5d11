from __future__ import annotations

import inspect
import pickle

import grpc
import pytest

import deployments.engine.errors as engine_errors
import deployments.errors as surface_errors
from deployments.errors import ERROR_TABLE, INTERNAL_MESSAGE, describe


def all_errors() -> list[type[Exception]]:
    return sorted(
        {
            value
            for module in (engine_errors, surface_errors)
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Exception)
        },
        key=lambda error: error.__name__,
    )


def make(error: type[Exception]) -> Exception:
    return error("what happened")


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_is_in_the_table(error: type[Exception]) -> None:
    own = [base for base in error.__mro__ if base in ERROR_TABLE]
    assert own, f"{error.__name__} has no row"
    assert describe(make(error)).message == "what happened"


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_survives_pickling(error: type[Exception]) -> None:
    original = make(error)
    copy = pickle.loads(pickle.dumps(original))  # noqa: S301
    assert type(copy) is error
    assert copy.args == original.args
    assert describe(copy) == describe(original)


def test_fields_survive_pickling() -> None:
    invalid = pickle.loads(pickle.dumps(surface_errors.RequestInvalidError("m", "p")))  # noqa: S301
    limited = pickle.loads(pickle.dumps(surface_errors.RateLimitedError("m", 2.5)))  # noqa: S301
    assert (invalid.message, invalid.param) == ("m", "p")
    assert limited.retry_after_s == 2.5


@pytest.mark.parametrize("row", ERROR_TABLE.values(), ids=lambda row: str(row.code))
def test_both_surfaces_agree_on_who_is_at_fault(row: surface_errors.ErrorClass) -> None:
    server_side = {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    assert (row.http_status >= 500) == (row.grpc_code in server_side)


def test_overload_says_when_to_come_back() -> None:
    error = describe(engine_errors.EngineOverloadedError("full", 2.2))
    assert error.kind.http_status == 429
    assert error.headers() == {"Retry-After": "3"}


def test_a_bug_shows_nothing() -> None:
    error = describe(KeyError("prompt text"))
    assert error.kind.http_status == 500
    assert error.message == INTERNAL_MESSAGE
    assert error.body() == {
        "error": {
            "message": INTERNAL_MESSAGE,
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }

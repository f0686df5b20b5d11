"""What every request from outside is validated by: strict types, and errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from deployments.errors import RequestInvalidError, UnsupportedParameterError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound="WireModel")

_UNIMPLEMENTED = "unimplemented"


class WireModel(BaseModel):
    """A request from outside, or a part of one.

    JSON types are never coerced, unknown fields are refused, and null is as good as absent.
    """

    unimplemented: ClassVar[Mapping[str, Sequence[object]]] = {}
    """Fields of the public API that are known only to be refused -> the values, besides null, that
    ask for nothing. A class that has a field of such a name implements it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:  # noqa: ANN401 - whatever was sent
        if not isinstance(data, dict):
            return data
        asked: dict[str, Any] = {}
        for name, value in data.items():
            neutral = None if name in cls.model_fields else cls.unimplemented.get(name)
            if value is None or (neutral is not None and _is_one_of(value, neutral)):
                continue
            if neutral is not None:
                raise PydanticCustomError(_UNIMPLEMENTED, "Not implemented", {"name": name})
            asked[name] = value
        return asked


def validate(model: type[M], data: dict[str, Any]) -> M:
    """Validate outside data against a wire model.

    Raises:
        RequestInvalidError: names the first field at fault.
        UnsupportedParameterError: a known field that is not implemented asks for something.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _invalid_request(error) from error


def _invalid_request(error: ValidationError) -> RequestInvalidError:
    """The first finding of a validation as an error that names the field, never its value."""
    finding = _most_specific(error.errors(include_url=False, include_input=False))
    if finding["type"] == _UNIMPLEMENTED:
        param = _path((*finding["loc"], finding["ctx"]["name"]))
        return UnsupportedParameterError(
            f"Unsupported parameter: '{param}' is not supported by this server.", param
        )
    param = _path(finding["loc"])
    if finding["type"] == "extra_forbidden":
        return RequestInvalidError(f"Unrecognized request argument supplied: {param}", param)
    if finding["type"] == "missing":
        return RequestInvalidError(f"Missing required parameter: '{param}'.", param)
    return RequestInvalidError(f"Invalid value for '{param}': {finding['msg']}.", param or None)


def _is_one_of(value: object, neutral: Sequence[object]) -> bool:
    # Compared with the type, because False == 0 and 1 == True.
    return any(type(value) is type(nothing) and value == nothing for nothing in neutral)


def _most_specific(findings: list[ErrorDetails]) -> ErrorDetails:
    # A union reports every branch. The client meant the one whose type fits, or else the one that
    # fits as deep as possible.
    field = findings[0]["loc"][:1]
    same_field = [finding for finding in findings if finding["loc"][:1] == field]
    return max(same_field, key=lambda at: (not at["type"].endswith("_type"), len(at["loc"])))


def _path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``; union branch tags left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in {"str", "list", "int", "float", "dict"}:
            path += f".{part}" if path else part
        if path == "logit_bias":
            break
    return path

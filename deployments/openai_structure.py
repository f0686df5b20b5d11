"""How HTTP clients ask for structured output: OpenAI's ``response_format`` and vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from deployments.engine.types import StructuredOutput, StructureKind
from deployments.errors import RequestInvalidError
from deployments.wire_model import WireModel

MAX_STRUCTURE_CHARS = 1 << 16

_RESPONSE_FORMAT = "response_format"
_STRUCTURED_OUTPUTS = "structured_outputs"

Structure = Annotated[str, Field(min_length=1, max_length=MAX_STRUCTURE_CHARS)]


class JsonSchema(WireModel):
    """A schema and its name."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    """Shown to nobody here; OpenAI's API wants one."""
    description: str | None = None
    """Accepted for compatibility; put it into the prompt."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """The JSON schema."""
    strict: bool | None = None
    """Accepted for compatibility: the schema is always kept."""


class ResponseFormat(WireModel):
    """OpenAI's way to ask."""

    type: Literal["text", "json_object", "json_schema"]
    """``text`` asks for nothing."""
    json_schema: JsonSchema | None = None
    """With the type ``json_schema``, and only then."""


class StructuredOutputs(WireModel):
    """VLLM's way to ask; exactly one field."""

    json_: Annotated[dict[str, Any] | Structure | None, Field(alias="json")] = None
    """A JSON schema, as an object or as text."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    regex: Structure | None = None
    """What the whole text matches; digits, words and spaces are ASCII."""
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    """The texts to choose from."""
    grammar: Structure | None = None
    """A context-free grammar as Lark or GBNF."""


def requested_structure(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> StructuredOutput | None:
    """What a client asks for, in the engine's words.

    Raises:
        RequestInvalidError: both ways were used, or one of them wrongly.
    """
    by_format = None if response_format is None else _of_format(response_format)
    if structured_outputs is None:
        return by_format
    if by_format is not None:
        raise RequestInvalidError(
            "'response_format' and 'structured_outputs' cannot both be set.", _STRUCTURED_OUTPUTS
        )
    return _of_fields(structured_outputs)


def _of_format(wanted: ResponseFormat) -> StructuredOutput | None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise RequestInvalidError(
            "'response_format.json_schema' goes with the type 'json_schema', and with no other.",
            "response_format.json_schema",
        )
    if wanted.json_schema is not None:
        text = _schema_text(wanted.json_schema.schema_, _RESPONSE_FORMAT)
        return _structure(StructureKind.JSON_SCHEMA, text, _RESPONSE_FORMAT)
    if wanted.type == "json_object":
        return _structure(StructureKind.JSON_OBJECT, "", _RESPONSE_FORMAT)
    return None


def _of_fields(wanted: StructuredOutputs) -> StructuredOutput:
    schema, choice = wanted.json_, wanted.choice
    if isinstance(schema, dict):
        schema = _schema_text(schema, _STRUCTURED_OUTPUTS)
    texts = {
        StructureKind.JSON_SCHEMA: schema,
        StructureKind.JSON_OBJECT: "" if wanted.json_object else None,
        StructureKind.REGEX: wanted.regex,
        StructureKind.CHOICE: None if choice is None else orjson.dumps(choice).decode(),
        StructureKind.GRAMMAR: wanted.grammar,
    }
    found = [(kind, text) for kind, text in texts.items() if text is not None]
    if len(found) != 1:
        raise RequestInvalidError(
            "'structured_outputs' needs exactly one of json, json_object, regex, choice and "
            "grammar.",
            _STRUCTURED_OUTPUTS,
        )
    return _structure(*found[0], _STRUCTURED_OUTPUTS)


def _schema_text(schema: dict[str, Any], param: str) -> str:
    try:
        return orjson.dumps(schema).decode()
    except orjson.JSONEncodeError as error:
        raise RequestInvalidError(
            f"The schema in '{param}' is nested too deeply.", param
        ) from error


def _structure(kind: StructureKind, text: str, param: str) -> StructuredOutput:
    if len(text) > MAX_STRUCTURE_CHARS:
        raise RequestInvalidError(
            f"'{param}' has {len(text)} characters; at most {MAX_STRUCTURE_CHARS} are accepted.",
            param,
        )
    return StructuredOutput(kind=kind, text=text, param=param)

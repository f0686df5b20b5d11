"""How clients ask for structured output, and what they are told when they ask wrongly."""

from __future__ import annotations

import json

import pytest

from deployments.engine.types import StructuredOutput, StructureKind
from deployments.errors import RequestInvalidError
from deployments.grpc_api import sampling_fields, structured_output
from deployments.openai_api import ChatCompletionRequest, CompletionRequest, parse_body
from protos import inference_pb2 as pb

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True, "description": "d"},
}


def chat(**fields: object) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_body(json.dumps(body).encode(), ChatCompletionRequest)


def ask(**fields: object) -> StructuredOutput | None:
    return chat(**fields).structure


def asked(kind: StructureKind, text: str, param: str) -> StructuredOutput:
    return StructuredOutput(kind=kind, text=text, param=param)


def test_asking_for_nothing_gives_nothing() -> None:
    assert ask() is None
    assert ask(response_format=None, structured_outputs=None) is None
    assert ask(response_format={"type": "text"}) is None


def test_response_formats() -> None:
    compact = json.dumps(SCHEMA, separators=(",", ":"))
    assert ask(response_format=FORMAT) == asked(
        StructureKind.JSON_SCHEMA, compact, "response_format"
    )
    assert ask(response_format={"type": "json_object"}) == asked(
        StructureKind.JSON_OBJECT, "", "response_format"
    )


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"json": {"type": "null"}}, StructureKind.JSON_SCHEMA, '{"type":"null"}'),
        ({"json": '{"type": "null"}'}, StructureKind.JSON_SCHEMA, '{"type": "null"}'),
        ({"json_object": True}, StructureKind.JSON_OBJECT, ""),
        ({"regex": "a+", "choice": None}, StructureKind.REGEX, "a+"),
        ({"choice": ["yes", "n\"o"]}, StructureKind.CHOICE, '["yes","n\\"o"]'),
        ({"grammar": 'start: "a"'}, StructureKind.GRAMMAR, 'start: "a"'),
    ],
)  # fmt: skip
def test_structured_outputs(fields: dict[str, object], kind: StructureKind, text: str) -> None:
    want = asked(kind, text, "structured_outputs")
    assert ask(structured_outputs=fields) == want
    body = {"model": "m", "prompt": "x", "structured_outputs": fields}
    assert parse_body(json.dumps(body).encode(), CompletionRequest).structure == want


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": FORMAT | {"type": "text"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a" * 70_000]}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {"x": "a" * 70_000}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"bad_words": [" "]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
    ],
)
def test_what_is_asked_wrongly_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        ask(**fields)
    assert caught.value.param == param


def test_the_format_of_text_goes_with_structured_outputs() -> None:
    structure = ask(structured_outputs={"regex": "a"}, response_format={"type": "text"})
    assert structure is not None
    assert structure.kind is StructureKind.REGEX


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        (pb.StructuredOutput(json_schema="{}"), StructureKind.JSON_SCHEMA, "{}"),
        (pb.StructuredOutput(json_object=True), StructureKind.JSON_OBJECT, ""),
        (pb.StructuredOutput(regex="a"), StructureKind.REGEX, "a"),
        (
            pb.StructuredOutput(choice=pb.Choices(texts=["a", "b"])),
            StructureKind.CHOICE,
            '["a","b"]',
        ),
        (pb.StructuredOutput(grammar="g"), StructureKind.GRAMMAR, "g"),
    ],
)
def test_grpc_asks_for_the_same(
    message: pb.StructuredOutput, kind: StructureKind, text: str
) -> None:
    options = pb.SamplingOptions(structured_output=message, bad_words=["x"])
    assert structured_output(options) == asked(kind, text, "structured_output")
    assert sampling_fields(options).bad_words == ["x"]
    assert structured_output(pb.SamplingOptions()) is None


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (pb.StructuredOutput(), "structured_output"),
        (pb.StructuredOutput(json_object=False), "structured_output.json_object"),
        (pb.StructuredOutput(regex=""), "structured_output.regex"),
        (pb.StructuredOutput(choice=pb.Choices()), "structured_output.choice"),
    ],
)
def test_grpc_refuses_the_same(message: pb.StructuredOutput, param: str) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        structured_output(pb.SamplingOptions(structured_output=message))
    assert caught.value.param == param

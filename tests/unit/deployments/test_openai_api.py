from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletionMessage

from deployments.engine.embedding import Pooling
from deployments.errors import RequestInvalidError, UnsupportedParameterError, describe
from deployments.openai_api import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingsRequest,
    Message,
    StreamOptions,
    parse_body,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "m", "prompt": "hi"}


def chat(**fields: object) -> bytes:
    return json.dumps(CHAT | fields).encode()


def plain(**fields: object) -> bytes:
    return json.dumps(PLAIN | fields).encode()


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 2.01, "temperature"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "1", "temperature"),
        ("temperature", True, "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.1, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.5, "min_p"),
        ("presence_penalty", 2.5, "presence_penalty"),
        ("frequency_penalty", -2.5, "frequency_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("n", 0, "n"),
        ("n", 9, "n"),
        ("n", 1.0, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("min_tokens", -1, "min_tokens"),
        ("seed", 1 << 63, "seed"),
        ("seed", "7", "seed"),
        ("stop", "", "stop"),
        ("stop", ["a", ""], "stop[1]"),
        ("stop", ["a", "b", "c", "d", "e"], "stop"),
        ("stop", 5, "stop"),
        ("stop_token_ids", [-1], "stop_token_ids[0]"),
        ("logit_bias", {"5": 101}, "logit_bias"),
        ("logit_bias", {"5": "1"}, "logit_bias"),
        ("logit_bias", [], "logit_bias"),
        ("ignore_eos", 1, "ignore_eos"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
        ("speculation", 1, "speculation"),
        ("tpot_target_s", 0, "tpot_target_s"),
        ("tpot_target_s", 61, "tpot_target_s"),
        ("tpot_target_s", "0.1", "tpot_target_s"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content"),
        ("messages", [{"role": "user", "content": []}], "messages[0].content"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
        ),
        ("model", "", "model"),
        ("model", 7, "model"),
        ("colour", "red", "colour"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, param: str) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        parse_body(chat(**{field: value}), ChatCompletionRequest)
    error = describe(caught.value)
    assert error.kind.http_status == 400
    assert error.body()["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert error.param == param
    assert param.split("[")[0].split(".")[0] in error.message


@pytest.mark.parametrize(
    ("body", "want"),
    [
        (plain(stop=["a"] * 5), "'stop': List should have at most 4 items"),
        (plain(stop=5), "'stop': Input should be a valid string"),
        (plain(stop=""), "'stop': String should have at least 1 character"),
        (plain(prompt=["a"] * 65), "'prompt': List should have at most 64 items"),
        (plain(prompt=[]), "'prompt': List should have at least 1 item"),
        (plain(prompt=[5, -1]), r"'prompt\[1\]': Input should be greater than or equal to 0"),
    ],
)
def test_of_several_forms_the_one_that_was_meant_is_explained(body: bytes, want: str) -> None:
    with pytest.raises(RequestInvalidError, match=f"^Invalid value for {want}"):
        parse_body(body, CompletionRequest)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != field}
    with pytest.raises(RequestInvalidError, match=f"Missing required parameter: '{field}'"):
        parse_body(json.dumps(body).encode(), ChatCompletionRequest)


@pytest.mark.parametrize(
    ("model", "needed"),
    [
        (ChatCompletionRequest, CHAT),
        (CompletionRequest, PLAIN),
        (EmbeddingsRequest, {"model": "m", "input": "hi"}),
    ],
)
def test_null_is_as_good_as_absent(
    model: type[ChatCompletionRequest], needed: dict[str, object]
) -> None:
    nulls = dict.fromkeys(set(model.model_fields) - set(needed))
    assert parse_body(json.dumps(needed | nulls).encode(), model) == parse_body(
        json.dumps(needed).encode(), model
    )


def test_null_is_as_good_as_absent_in_stream_options() -> None:
    options = {"include_usage": None, "include_obfuscation": None}
    request = parse_body(chat(stream=True, stream_options=options), ChatCompletionRequest)
    assert request.stream_options == StreamOptions()


def test_a_null_in_a_schema_is_kept() -> None:
    schema = {"const": None}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    structure = parse_body(chat(response_format=wanted), ChatCompletionRequest).structure
    assert structure is not None
    assert json.loads(structure.text) == schema


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"temperature": NaN}', b"nope"])
def test_broken_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestInvalidError, match="not valid JSON"):
        parse_body(body, ChatCompletionRequest)


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"'])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestInvalidError, match="must be a JSON object"):
        parse_body(body, ChatCompletionRequest)


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "auto", "required"),
        ("best_of", 1, 2),
        ("echo", False, True),
        ("suffix", None, "end"),
        ("modalities", ["text"], ["audio"]),
        ("store", False, True),
    ],
)
def test_an_unimplemented_parameter_passes_only_at_its_default(
    field: str, neutral: object, asking: object
) -> None:
    parse_body(chat(**{field: neutral}), ChatCompletionRequest)
    with pytest.raises(UnsupportedParameterError) as caught:
        parse_body(chat(**{field: asking}), ChatCompletionRequest)
    error = describe(caught.value)
    assert (error.param, error.kind.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, (None, None)),
        ({"logprobs": False, "top_logprobs": 0}, (None, None)),
        ({"logprobs": True}, (0, None)),
        ({"logprobs": True, "top_logprobs": 20, "prompt_logprobs": 3}, (20, 3)),
    ],
)
def test_log_probabilities_of_a_chat(
    fields: dict[str, object], want: tuple[int | None, int | None]
) -> None:
    body = parse_body(chat(**fields), ChatCompletionRequest)
    assert (body.num_logprobs, body.num_prompt_logprobs) == want


def test_alternatives_without_log_probabilities_are_refused() -> None:
    body = parse_body(chat(top_logprobs=2), ChatCompletionRequest)
    with pytest.raises(RequestInvalidError, match="only allowed when 'logprobs'") as caught:
        _ = body.num_logprobs
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, (None, None)),
        ({"logprobs": 0}, (0, None)),
        ({"logprobs": 5, "echo": False}, (5, None)),
        ({"echo": True}, (None, None)),
        ({"logprobs": 2, "echo": True}, (2, 2)),
        ({"logprobs": 2, "echo": True, "prompt_logprobs": 7}, (2, 7)),
        ({"prompt_logprobs": 0}, (None, 0)),
    ],
)
def test_log_probabilities_of_a_completion(
    fields: dict[str, object], want: tuple[int | None, int | None]
) -> None:
    data = {"model": "m", "prompt": "p"} | fields
    body = parse_body(json.dumps(data).encode(), CompletionRequest)
    assert (body.num_logprobs, body.num_prompt_logprobs) == want


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (ChatCompletionRequest, "logprobs", 1),
        (ChatCompletionRequest, "top_logprobs", 21),
        (ChatCompletionRequest, "prompt_logprobs", -1),
        (CompletionRequest, "logprobs", 6),
        (CompletionRequest, "logprobs", True),
        (CompletionRequest, "prompt_logprobs", 21),
    ],
)
def test_numbers_of_alternatives_are_checked(
    model: type[ChatCompletionRequest | CompletionRequest], field: str, value: object
) -> None:
    data: dict[str, object] = {"model": "m", field: value}
    data |= {"messages": CHAT["messages"]} if model is ChatCompletionRequest else {"prompt": "p"}
    with pytest.raises(RequestInvalidError) as caught:
        parse_body(json.dumps(data).encode(), model)
    assert caught.value.param == field


def test_labels_for_the_provider_are_accepted() -> None:
    parse_body(chat(user="u1", metadata={"a": "b"}), ChatCompletionRequest)


def test_stream_options_need_a_stream() -> None:
    with pytest.raises(RequestInvalidError) as caught:
        parse_body(chat(stream_options={"include_usage": True}), ChatCompletionRequest)
    assert caught.value.param == "stream_options"


def test_both_names_of_the_output_limit_are_refused() -> None:
    request = parse_body(chat(max_tokens=1, max_completion_tokens=1), ChatCompletionRequest)
    with pytest.raises(RequestInvalidError, match="cannot both be set"):
        _ = request.output_limit


@pytest.mark.parametrize("more", [{}, {"refusal": "", "annotations": [], "tool_calls": []}])
def test_an_answer_can_be_sent_back_as_the_sdk_dumps_it(more: dict[str, object]) -> None:
    answer = ChatCompletionMessage(role="assistant", content="hello").model_dump() | more
    request = parse_body(chat(messages=[*CHAT["messages"], answer]), ChatCompletionRequest)
    assert request.messages[1] == Message(role="assistant", content="hello")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [{"id": "1", "type": "function"}]),
        ("function_call", {"name": "f", "arguments": ""}),
        ("tool_call_id", "1"),
        ("refusal", "I cannot."),
    ],
)
def test_what_a_message_asks_for_in_vain_is_named(field: str, value: object) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "x", field: value}]
    with pytest.raises(UnsupportedParameterError) as caught:
        parse_body(chat(messages=messages), ChatCompletionRequest)
    assert caught.value.param == f"messages[1].{field}"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_body(chat(messages=[{"role": "user", "content": parts}]), ChatCompletionRequest)
    assert request.messages[0].text() == "ab"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_every_form_of_a_prompt(prompt: object, prompts: list[object]) -> None:
    assert parse_body(plain(prompt=prompt), CompletionRequest).prompts() == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [1, -1], [1.5], {}, None, 3])
def test_other_forms_of_a_prompt_are_refused(prompt: object) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        parse_body(plain(prompt=prompt), CompletionRequest)
    assert (caught.value.param or "").startswith("prompt")


def test_values_never_show_in_errors() -> None:
    with pytest.raises(RequestInvalidError) as caught:
        parse_body(chat(temperature="the secret text"), ChatCompletionRequest)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_an_embeddings_input_has_four_shapes(value: object, inputs: list[object]) -> None:
    body = json.dumps({"model": "m", "input": value, "user": "me"}).encode()
    call = parse_body(body, EmbeddingsRequest).call()
    assert call == (inputs, Pooling.MEAN, True, "input")


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"input": []}, RequestInvalidError, "input"),
        ({"input": [[]]}, RequestInvalidError, "input[0]"),
        ({"input": ["a", 1]}, RequestInvalidError, "input[1]"),
        ({"input": "a", "dimensions": 8}, UnsupportedParameterError, "dimensions"),
        ({"input": "a", "pooling": "max"}, RequestInvalidError, "pooling"),
        ({"input": "a", "encoding_format": "int8"}, RequestInvalidError, "encoding_format"),
        ({"input": "a", "temperature": 1}, RequestInvalidError, "temperature"),
        ({}, RequestInvalidError, "input"),
    ],
)
def test_wrong_embeddings_requests_name_the_field(
    fields: dict[str, object], error: type[RequestInvalidError], param: str
) -> None:
    with pytest.raises(error) as caught:
        parse_body(json.dumps({"model": "m"} | fields).encode(), EmbeddingsRequest)
    assert caught.value.param == param

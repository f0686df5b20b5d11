from __future__ import annotations

import pytest

from deployments import grpc_api
from deployments.engine.embedding import Pooling
from deployments.errors import RequestInvalidError
from deployments.tokenizer import ChatTurn
from protos import inference_pb2 as pb


def test_absent_fields_take_the_defaults() -> None:
    fields = grpc_api.sampling_fields(pb.SamplingOptions())
    assert fields.temperature is None
    assert fields.seed is None
    assert grpc_api.max_tokens(pb.SamplingOptions()) is None
    assert grpc_api.num_choices(pb.GenerateRequest()) == 1


def test_zero_is_not_absence() -> None:
    options = pb.SamplingOptions(temperature=0.0, seed=0, top_k=0)
    fields = grpc_api.sampling_fields(options)
    assert (fields.temperature, fields.seed, fields.top_k) == (0.0, 0, 0)


def test_every_field_arrives() -> None:
    options = pb.SamplingOptions(
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        seed=-4,
        logit_bias={7: 1.5},
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        min_tokens=2,
        logprobs=0,
        prompt_logprobs=4,
        bad_words=["no"],
    )
    fields = grpc_api.sampling_fields(options)
    assert fields.model_dump() == {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "seed": -4,
        "logit_bias": {"7": 1.5},
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": 0,
        "prompt_logprobs": 4,
        "bad_words": ["no"],
    }
    assert (fields.num_logprobs, fields.num_prompt_logprobs) == (0, 4)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (pb.SamplingOptions(temperature=2.5), "temperature"),
        (pb.SamplingOptions(temperature=float("nan")), "temperature"),
        (pb.SamplingOptions(top_p=float("inf")), "top_p"),
        (pb.SamplingOptions(top_k=-2), "top_k"),
        (pb.SamplingOptions(stop=["a"] * 5), "stop"),
        (pb.SamplingOptions(stop=[""]), "stop[0]"),
        (pb.SamplingOptions(logit_bias={1: 200.0}), "logit_bias"),
        (pb.SamplingOptions(logprobs=21), "logprobs"),
        (pb.SamplingOptions(prompt_logprobs=21), "prompt_logprobs"),
    ],
)
def test_ranges_are_those_of_http(options: pb.SamplingOptions, param: str) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        grpc_api.sampling_fields(options)
    assert caught.value.param == param


def test_counts_are_checked() -> None:
    assert grpc_api.max_tokens(pb.SamplingOptions(max_tokens=0)) == 0
    for n in (0, 9):
        with pytest.raises(RequestInvalidError, match="'n'"):
            grpc_api.num_choices(pb.GenerateRequest(n=n))


def test_targets_are_checked() -> None:
    assert grpc_api.tpot_target_s(pb.GenerateRequest()) is None
    assert grpc_api.tpot_target_s(pb.GenerateRequest(tpot_target_s=0.03)) == 0.03
    for target_s in (0.0, -1.0, 61.0, float("nan"), float("inf")):
        with pytest.raises(RequestInvalidError, match="tpot_target_s"):
            grpc_api.tpot_target_s(pb.GenerateRequest(tpot_target_s=target_s))


def test_conversations() -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert grpc_api.chat_turns(chat) == [ChatTurn("user", "hi")]
    chat.messages.add(role="robot", content="x")
    with pytest.raises(RequestInvalidError) as caught:
        grpc_api.chat_turns(chat)
    assert caught.value.param == "messages[1].role"
    with pytest.raises(RequestInvalidError):
        grpc_api.chat_turns(pb.ChatMessages())


def test_embedding_inputs_may_be_mixed() -> None:
    request = pb.EmbedRequest(
        inputs=[
            pb.EmbedInput(text="one"),
            pb.EmbedInput(token_ids=pb.TokenIds(ids=[1, 2])),
            pb.EmbedInput(text=""),
        ],
        normalize=False,
        pooling=pb.POOLING_LAST,
    )
    call = grpc_api.embedding_call(request)
    assert call == (["one", [1, 2], ""], Pooling.LAST, False, "inputs")
    defaults = grpc_api.embedding_call(pb.EmbedRequest(inputs=[pb.EmbedInput(text="a")]))
    assert (defaults.pooling, defaults.normalize) == (Pooling.MEAN, True)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.EmbedRequest(), "inputs"),
        (pb.EmbedRequest(inputs=[pb.EmbedInput(text="a"), pb.EmbedInput()]), "inputs[1]"),
        (pb.EmbedRequest(inputs=[pb.EmbedInput(text="a")], pooling=7), "pooling"),
    ],
)
def test_wrong_embed_requests_name_the_field(request_: pb.EmbedRequest, param: str) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        grpc_api.embedding_call(request_)
    assert caught.value.param == param

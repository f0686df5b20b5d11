"""What SGLang is asked for."""

from __future__ import annotations

import json
import math

import pytest

from deployments.engine.errors import RequestRejectedError
from deployments.engine.sglang_engine.own_params import read_own_params, sampling_row
from deployments.engine.sglang_engine.requests import (
    cache_salt,
    generation_arguments,
    refuse_unsupported,
)
from deployments.engine.speculation.noise import choice_key
from deployments.engine.types import CaptureSpec, StructuredOutput, StructureKind
from deployments.engine.validation import ModelLimits
from tests.fakes_engine import make_request

LIMITS = ModelLimits(vocab_size=1000, max_model_len=100, eos_token_ids=frozenset({2}))


def arguments(**changes):
    return generation_arguments(make_request(**changes), LIMITS, "rid")


def parameters(**changes):
    return arguments(**changes)["sampling_params"]


def test_resumed_output_is_a_part_of_the_input():
    asked = arguments(prompt=[3, 4], resumed_output_ids=(5, 6), max_tokens=20)
    assert asked["input_ids"] == [3, 4, 5, 6]
    assert asked["sampling_params"]["max_new_tokens"] == 18


def test_the_context_bounds_the_output():
    assert parameters(prompt=[1] * 90, max_tokens=50)["max_new_tokens"] == 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ignore_eos": False}, (False, [2])),
        ({"ignore_eos": False, "stop_token_ids": (7,)}, (False, [2, 7])),
        ({"ignore_eos": True}, (True, None)),
        ({"ignore_eos": False, "min_tokens": 5}, (True, None)),
        (
            {"ignore_eos": False, "min_tokens": 2, "resumed_output_ids": (9, 9)},
            (False, [2]),
        ),
    ],
)
def test_stop_tokens_are_told_once_they_may_end_the_output(changes, expected):
    asked = parameters(**changes)
    assert (asked["ignore_eos"], asked.get("stop_token_ids")) == expected


def test_sampling_is_passed_on():
    asked = parameters(temperature=0.7, top_p=0.9, top_k=11, min_p=0.1, presence_penalty=0.5)
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 0.9, 11)
    assert (asked["min_p"], asked["presence_penalty"]) == (0.1, 0.5)
    assert parameters(top_k=0)["top_k"] == -1


def test_seed_and_choice_reach_the_sampler():
    asked = parameters(seed=2**64 - 1, choice_index=3, temperature=0.5, top_k=7)
    own = read_own_params(asked["custom_params"])
    assert sampling_row(own) == (choice_key(2**64 - 1, 3), 0.5, 7, 1.0, 0.0)
    assert read_own_params(None) is None


def test_biases_bans_and_penalties_of_resumed_output_add_up():
    asked = parameters(
        logit_bias=((5, 2.0), (6, 1.0)),
        bad_token_sequences=((8,),),
        resumed_output_ids=(5, 9, 5),
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    assert asked["logit_bias"] == {"5": 1.0, "6": 1.0, "9": -0.75, "8": -math.inf}
    assert "logit_bias" not in parameters()


def test_log_probabilities_are_asked_for_where_they_are_wanted():
    assert "return_logprob" not in arguments()
    output = arguments(num_logprobs=0)
    assert (output["top_logprobs_num"], output["logprob_start_len"]) == (1, -1)
    prompt = arguments(num_logprobs=2, num_prompt_logprobs=5)
    assert (prompt["top_logprobs_num"], prompt["logprob_start_len"]) == (5, 0)
    resumed = arguments(num_prompt_logprobs=5, resumed_output_ids=(4,))
    assert "return_logprob" not in resumed


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (StructureKind.JSON_SCHEMA, '{"type": "string"}', {"json_schema": '{"type": "string"}'}),
        (StructureKind.JSON_OBJECT, "", {"json_schema": '{"type": "object"}'}),
        (StructureKind.REGEX, "[a-z]+", {"regex": "[a-z]+"}),
        (StructureKind.CHOICE, '["a\\"b", "ü"]', {"ebnf": 'start: "a\\"b" | "ü"'}),
        (StructureKind.GRAMMAR, 'root ::= "a"', {"ebnf": 'root ::= "a"'}),
    ],
)
def test_structures_become_fields(kind, text, expected):
    asked = parameters(structure=StructuredOutput(kind=kind, text=text))
    fields = {name: asked[name] for name in ("json_schema", "regex", "ebnf") if name in asked}
    assert fields == expected


def test_a_choice_of_nothing_is_refused():
    structure = StructuredOutput(kind=StructureKind.CHOICE, text=json.dumps([]))
    with pytest.raises(RequestRejectedError, match="nothing to choose from"):
        parameters(structure=structure)


def test_tenants_have_salts_that_do_not_give_their_keys_away():
    first, second = bytes(32), bytes([1] * 32)
    assert arguments(tenant_key=first)["cache_salt"] != arguments(tenant_key=second)["cache_salt"]
    assert arguments(tenant_key=second)["cache_salt"] == cache_salt(second)
    assert second.hex()[:16] not in cache_salt(second)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"capture": CaptureSpec(layers=(0,))}, "capture"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"bad_token_sequences": ((1, 2),)}, "bad_words"),
    ],
)
def test_what_sglang_does_otherwise_is_refused(changes, param):
    with pytest.raises(RequestRejectedError) as caught:
        refuse_unsupported(make_request(**changes))
    assert caught.value.param == param

from __future__ import annotations

import pytest

from deployments.engine.errors import RequestRejectedError
from deployments.engine.validation import ModelLimits, validate_request
from tests.fakes_engine import make_request

LIMITS = ModelLimits(vocab_size=64, max_model_len=100, eos_token_ids=frozenset({63}))


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (make_request(prompt=[]), "prompt", "no tokens"),
        (make_request(prompt=[1] * 100), "prompt", "maximum context length is 100 tokens"),
        (make_request(prompt=[1, 64]), "prompt", "out of range"),
        (make_request(prompt=[-1]), "prompt", "out of range"),
        (make_request(prompt=[1] * 101, max_tokens=0), "prompt", "of which 0 must be left"),
        (make_request(max_tokens=-1), "max_tokens", "negative"),
        (make_request(logit_bias=((64, 1.0),)), "logit_bias", "out of range"),
        (make_request(stop_token_ids=(99,)), "stop_token_ids", "out of range"),
        (make_request(resumed_output_ids=(1,) * 21), "resumed_output_ids", "longer"),
        (make_request(resumed_output_ids=(70,)), "resumed_output_ids", "out of range"),
    ],
)
def test_impossible_requests_are_refused(request_, param, words):
    with pytest.raises(RequestRejectedError, match=words) as caught:
        validate_request(request_, LIMITS)
    assert caught.value.param == param


def test_possible_requests_pass():
    validate_request(make_request(prompt=[1] * 99), LIMITS)
    validate_request(make_request(prompt=[1] * 100, max_tokens=0), LIMITS)
    validate_request(make_request(resumed_output_ids=(1,) * 20), LIMITS)


def test_limits_of_a_request():
    assert LIMITS.max_output_tokens(make_request(prompt=[1] * 90)) == 10
    assert LIMITS.max_output_tokens(make_request(prompt=[1], max_tokens=3)) == 3
    assert LIMITS.stop_token_ids(make_request(stop_token_ids=(5,), ignore_eos=True)) == {5}
    assert LIMITS.stop_token_ids(make_request(stop_token_ids=(5,), ignore_eos=False)) == {5, 63}

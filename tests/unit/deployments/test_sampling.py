from __future__ import annotations

import pytest

from deployments.engine.types import SamplingParams
from deployments.errors import RequestInvalidError
from deployments.sampling import SamplingFields, build_sampling_params, check_prompt_token_ids
from deployments.wire_model import validate


def build(max_tokens: int | None = 10, room: int = 100, **fields: object) -> SamplingParams:
    return build_sampling_params(
        SamplingFields.model_validate(fields),
        max_tokens=max_tokens,
        max_tokens_param="max_tokens",
        room=room,
        vocab_size=50,
    )


def test_defaults_are_plain_sampling() -> None:
    params = build(seed=1)
    assert params == SamplingParams(max_tokens=10, seed=1)


def test_the_limit_is_the_room_unless_less_is_asked_for() -> None:
    assert build(None).max_tokens == 100
    assert build(500).max_tokens == 100
    assert build(5).max_tokens == 5


def test_a_negative_seed_becomes_its_unsigned_bits() -> None:
    assert build(seed=-1).seed == (1 << 64) - 1


def test_absent_seeds_differ() -> None:
    assert len({build().seed for _ in range(8)}) == 8


def test_top_k_off_has_two_spellings() -> None:
    assert build(top_k=-1).top_k == build(top_k=0).top_k == 0


@pytest.mark.parametrize(
    ("asked", "used"), [(0, 0), (5e-324, 0), (1e-307, 0), (9e-6, 0), (1e-5, 1e-5), (0.3, 0.3)]
)
def test_a_temperature_that_overflows_logits_is_greedy(asked: float, used: float) -> None:
    assert build(temperature=asked).temperature == used


@pytest.mark.parametrize("penalty", [0.0, 5e-324, 1e-310, 0.009])
def test_a_repetition_penalty_that_overflows_logits_is_refused(penalty: float) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        validate(SamplingFields, {"repetition_penalty": penalty})
    assert caught.value.param == "repetition_penalty"
    assert build(repetition_penalty=0.01).repetition_penalty == 0.01


def test_stop_may_be_one_string() -> None:
    assert build(stop="x").stop_strings == ("x",)
    assert build(stop=["x", "y"]).stop_strings == ("x", "y")


def test_logit_bias_becomes_sorted_pairs() -> None:
    assert build(logit_bias={"7": -1, "3": 2.5}).logit_bias == ((3, 2.5), (7, -1.0))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"50": 1.0}}, "logit_bias"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"٣": 1.0}}, "logit_bias"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"min_tokens": 11}, "min_tokens"),
    ],
)
def test_rules_across_fields(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestInvalidError) as caught:
        build(**fields)
    assert caught.value.param == param


def test_prompt_ids_must_exist() -> None:
    check_prompt_token_ids([0, 49], 50, "prompt")
    with pytest.raises(RequestInvalidError):
        check_prompt_token_ids([0, 50], 50, "prompt")


def test_log_probabilities_are_off_until_asked_for() -> None:
    assert (build().num_logprobs, build().num_prompt_logprobs) == (None, None)
    assert build(prompt_logprobs=0).num_prompt_logprobs == 0

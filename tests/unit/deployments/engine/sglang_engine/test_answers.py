"""What SGLang's items mean."""

from __future__ import annotations

from collections import Counter

import pytest

from deployments.engine.errors import EngineError, EngineOverloadedError, RequestRejectedError
from deployments.engine.sglang_engine.answers import read_answer, speculation_stats
from deployments.engine.sglang_engine.draft_rounds import RoundCounts
from deployments.engine.types import (
    FinishReason,
    SpeculationStats,
    StructuredOutput,
    StructureKind,
    TokenLogprob,
)
from tests.fakes_engine import make_request
from tests.fakes_sglang import item


def test_tokens_and_counts():
    details = {"device": 3, "host": 0, "storage": 16}
    answer = read_answer(
        item(4, 5, cached_tokens=19, cached_tokens_details=details, num_retractions=2),
        make_request(),
    )
    assert answer.token_ids == (4, 5)
    assert answer.finish is None
    assert (answer.num_cached, answer.num_tier_cached, answer.num_preemptions) == (19, 16, 2)


def test_verification_is_counted_without_padding():
    first = read_answer(
        item(4, 5, 6, paceline=[[2, 1, 1, 1, 0], None, [0, 0, 0, 0, 1]]), make_request()
    )
    last = read_answer(
        item(7, 8, 9, 1, paceline=[[4, 3, 0, 0, 0], None, None, None]), make_request()
    )
    stats = speculation_stats(Counter([*first.rounds, *last.rounds, *last.rounds]))
    assert first.rounds == (RoundCounts(2, 1, 1, 1, 0), RoundCounts(0, 0, 0, 0, 1))
    assert (stats.num_spec_steps, stats.num_draft_tokens) == (3, 10)
    assert (stats.num_accepted_draft_tokens, stats.num_accepted_pool_tokens) == (7, 1)
    assert (stats.num_table_hits, stats.num_table_misses) == (1, 1)
    assert stats.acceptance_histogram == (0, 1, 0, 2)
    assert stats.mean_acceptance_length == pytest.approx(1 + 7 / 3)


def test_a_sglang_that_verifies_nothing_has_nothing_to_count():
    answer = read_answer(item(4), make_request())
    assert speculation_stats(Counter(answer.rounds)) == SpeculationStats()


@pytest.mark.parametrize(
    ("reason", "finish", "match"),
    [
        ({"type": "stop", "matched": 2}, FinishReason.STOP, 2),
        ({"type": "stop", "matched": "text"}, FinishReason.STOP, None),
        ({"type": "length", "length": 5}, FinishReason.LENGTH, None),
        ({"type": "abort", "message": "Aborted", "status_code": None}, FinishReason.ABORT, None),
    ],
)
def test_reasons(reason, finish, match):
    answer = read_answer(item(1, finish=reason), make_request())
    assert (answer.finish, answer.match) == (finish, match)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RequestRejectedError), (503, EngineOverloadedError), (500, EngineError)],
)
def test_an_abort_with_a_status_is_an_error(status, error):
    reason = {"type": "abort", "message": "what is wrong", "status_code": status}
    with pytest.raises(error, match="what is wrong") as caught:
        read_answer(item(finish=reason), make_request())
    assert type(caught.value) is error


def test_a_refused_structure_names_its_field():
    structure = StructuredOutput(kind=StructureKind.REGEX, text="((", param="guided_regex")
    reason = {"type": "abort", "message": "unclosed group", "status_code": 400}
    with pytest.raises(RequestRejectedError) as caught:
        read_answer(item(finish=reason), make_request(structure=structure))
    assert caught.value.param == "guided_regex"


OWN = [(-0.1, 4, None), (-2.5, 5, None)]
TOPS = [[(-0.1, 4, None), (-3.0, 9, None)], [(-0.2, 9, None), (-2.0, 4, None)]]


def test_log_probabilities():
    answer = read_answer(
        item(4, 5, output_token_logprobs=OWN, output_top_logprobs=TOPS),
        make_request(num_logprobs=2),
    )
    assert answer.logprobs == (
        TokenLogprob(4, -0.1, 1, ((4, -0.1), (9, -3.0))),
        # Neither of the two likeliest: SGLang does not say which place it has.
        TokenLogprob(5, -2.5, 0, ((9, -0.2), (4, -2.0))),
    )


def test_alternatives_that_were_only_asked_for_the_rank_are_not_told():
    answer = read_answer(
        item(4, 5, output_token_logprobs=OWN, output_top_logprobs=[[top[0]] for top in TOPS]),
        make_request(num_logprobs=0),
    )
    assert [(entry.rank, entry.top) for entry in answer.logprobs] == [(1, ()), (0, ())]


def test_log_probabilities_of_the_prompt():
    answer = read_answer(
        item(
            7,
            input_token_logprobs=[(None, 3, None), *OWN],
            input_top_logprobs=[None, *TOPS],
            output_token_logprobs=[(-1.0, 7, None)],
            output_top_logprobs=[[(-1.0, 7, None)]],
        ),
        make_request(num_prompt_logprobs=1),
    )
    assert answer.logprobs == ()
    assert answer.prompt_logprobs == (
        None,
        TokenLogprob(4, -0.1, 1, ((4, -0.1),)),
        TokenLogprob(5, -2.5, 0, ((9, -0.2),)),
    )

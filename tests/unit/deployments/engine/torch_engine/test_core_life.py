"""How requests begin and end in the core: aborts, deadlines, overload, bad logits, stop rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.engine.errors import (
    DeadlineExceededError,
    EngineOverloadedError,
    InvalidLogitsError,
)
from deployments.engine.speculation.speculator import NOTHING_ELSE
from deployments.engine.types import FinishReason
from tests.fakes_engine import (
    FakePageStore,
    HostileSpeculator,
    OracleSpeculator,
    detokenize,
    expected,
    make_config,
    make_request,
)
from tests.unit.deployments.engine.torch_engine.test_core_text import Session

PLAIN = expected(make_request(max_tokens=40)).token_ids


def first_new(token_ids, start):
    """The first index from ``start`` on whose token did not occur before."""
    return next(i for i in range(start, len(token_ids)) if token_ids[i] not in token_ids[:i])


def test_stop_token_inside_an_accepted_block_drops_the_rest():
    at = first_new(PLAIN, 6)
    request = make_request(max_tokens=40, stop_token_ids=(PLAIN[at],))
    for k in range(1, 9):
        session = Session(make_config(num_draft_tokens=k), OracleSpeculator())
        session.add(1, request)
        session.run()
        assert tuple(session.tokens[1]) == PLAIN[: at + 1]
        end = session.ends[1]
        assert (end.finish_reason, end.stop_match) == (FinishReason.STOP, PLAIN[at])
        # What was drafted and right, but lies behind the end, is not counted as output.
        spec = end.speculation
        assert 1 + spec.num_spec_steps + spec.num_accepted_draft_tokens in (at + 1, at + 2)
        assert spec.num_accepted_draft_tokens <= at


@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_stop_string_across_tokens_inside_an_accepted_block(k):
    string = detokenize(PLAIN[9:12])
    request = make_request(max_tokens=40, stop_strings=("?", string))
    want = expected(request)
    assert want.stop_match == string
    session = Session(make_config(num_draft_tokens=k), OracleSpeculator())
    session.add(1, request)
    session.run()
    assert tuple(session.tokens[1]) == want.token_ids
    assert session.ends[1].stop_match == string


@pytest.mark.parametrize("min_tokens", range(1, 12))
def test_min_tokens_is_counted_along_the_draft(min_tokens):
    """The oracle drafts the stop token that must not come yet; the step's own rows forbid it."""
    stop = PLAIN[4]
    request = make_request(max_tokens=20, stop_token_ids=(stop,), min_tokens=min_tokens)
    session = Session(make_config(num_draft_tokens=8), OracleSpeculator())
    session.add(1, request)
    session.run()
    want = expected(request)
    assert tuple(session.tokens[1]) == want.token_ids
    assert session.ends[1].finish_reason is want.finish_reason
    assert stop not in session.tokens[1][:min_tokens]


def test_abort_in_every_state():
    store = FakePageStore(answer="held")
    session = Session(make_config(num_pages=6, max_num_seqs=2), OracleSpeculator(), store)
    session.add(1, make_request("loading", [1] * 200))
    session.add(2, make_request("decoding", [2], max_tokens=300))
    session.add(3, make_request("waiting", [3] * 10))
    session.step()
    session.add(4, make_request("prefilling", [4] * 190))
    for session_id in (1, 3, 2, 4):
        session.core.abort(session_id)
        session.collect()
        session.core.check_integrity()
        assert session.ends[session_id].finish_reason is FinishReason.ABORT
    session.core.abort(99)
    store.release_loads()
    session.run()
    session.assert_all_free()


def test_abort_of_a_preempted_sequence():
    session = Session(make_config(num_pages=3, max_num_seqs=2))
    session.add(1, make_request("old", [1] * 60, max_tokens=120))
    session.add(2, make_request("young", [2] * 60, max_tokens=120))
    while not session.core.stats().num_preemptions:
        assert session.step()
    assert 2 not in session.ends
    session.core.abort(2)
    session.run()
    assert session.ends[2].finish_reason is FinishReason.ABORT
    want = expected(make_request("old", [1] * 60, max_tokens=120))
    assert tuple(session.tokens[1]) == want.token_ids
    session.assert_all_free()


def test_deadline_ends_running_and_waiting_requests():
    session = Session(make_config(max_num_seqs=1))
    session.add(1, make_request("running", max_tokens=500, deadline=10.0))
    session.add(2, make_request("waiting", deadline=5.0))
    session.add(3, make_request("patient"))
    session.step()
    assert session.core.idle_s() == 5.0
    session.now = 5.0
    session.step()
    assert isinstance(session.ends[2], DeadlineExceededError)
    assert 1 not in session.ends
    session.now = 10.0
    session.run()
    assert isinstance(session.ends[1], DeadlineExceededError)
    assert session.ends[3].finish_reason is FinishReason.LENGTH
    session.assert_all_free()


def test_one_request_too_many_is_refused():
    session = Session(make_config(max_num_seqs=2, max_waiting=1))
    for session_id in range(1, 5):
        session.add(session_id, make_request(f"r{session_id}"))
    assert isinstance(session.ends[4], EngineOverloadedError)
    session.run()
    assert all(session.ends[i].finish_reason is FinishReason.LENGTH for i in (1, 2, 3))


@pytest.mark.parametrize("num_resumed", [5, 40])
def test_what_another_replica_had_begun_finds_a_place_in_a_full_queue(num_resumed):
    session = Session(make_config(max_num_seqs=1, max_waiting=2))
    for session_id in range(1, 4):
        session.add(session_id, make_request(f"r{session_id}", max_tokens=2))
    resumed = make_request(max_tokens=40, resumed_output_ids=PLAIN[:num_resumed])
    session.add(4, resumed)
    session.add(5, make_request("one too many"))
    assert isinstance(session.ends.pop(5), EngineOverloadedError)
    session.run()
    assert {end.finish_reason for end in session.ends.values()} == {FinishReason.LENGTH}
    assert PLAIN[num_resumed:] == tuple(session.tokens[4])
    session.assert_all_free()


def test_lower_priority_value_goes_first():
    session = Session(make_config(max_num_seqs=1))
    session.add(1, make_request("a", priority=1))
    session.add(2, make_request("b", priority=1))
    session.add(3, make_request("c", priority=0))
    session.run()
    assert list(session.ends) == [3, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("speculator", [None, OracleSpeculator, lambda: HostileSpeculator(5)])
def test_bad_logits_end_one_request_and_no_other(temperature, speculator):
    bad = make_request(max_tokens=40, temperature=temperature)
    text = expected(bad).token_ids
    at = first_new(text, 7)
    good = make_request("good", [8, 9], max_tokens=40, logit_bias=((text[at], -100.0),))
    session = Session(speculator=speculator() if speculator else None)
    session.parts.runner.nan_after_token = text[at]
    session.add(1, bad)
    session.add(2, good)
    session.run()
    assert isinstance(session.ends[1], InvalidLogitsError)
    assert tuple(session.tokens[1]) == text[: at + 1]
    assert tuple(session.tokens[2]) == expected(good).token_ids
    session.assert_all_free()


def test_young_prefill_does_not_stop_an_old_one_from_decoding():
    """Chunked prefill: the running sequence gets a token in every step."""
    session = Session(make_config(max_batch_tokens=64))
    session.add(1, make_request("old", max_tokens=60))
    session.step()
    session.add(2, make_request("young", [2] * 600))
    for _ in range(8):
        before = len(session.tokens[1])
        session.step()
        assert len(session.tokens[1]) == before + 1
        assert not session.tokens[2]
    session.run()
    assert tuple(session.tokens[2]) == expected(make_request("young", [2] * 600)).token_ids


def test_drafts_leave_room_for_a_prefill():
    session = Session(make_config(max_batch_tokens=64, num_draft_tokens=16), OracleSpeculator())
    for session_id in range(1, 5):
        session.add(session_id, make_request(f"old{session_id}", max_tokens=900))
    session.step()
    session.add(5, make_request("young", [2] * 300))
    # Four decodes and at most 30 draft nodes leave 30 of 64 rows: ten steps for 300 tokens.
    for step in range(10):
        assert not session.tokens[5], step
        session.step()
    assert session.tokens[5]


def test_sampled_text_depends_on_seed_and_choice_only():
    base = make_request(temperature=1.0, max_tokens=30)
    variants = [
        base,
        replace(base, choice_index=1),
        replace(base, sampling=replace(base.sampling, seed=8)),
        replace(base, request_id="another", tenant_key=b"k" * 32, priority=3),
    ]
    session = Session(speculator=OracleSpeculator())
    for session_id, request in enumerate(variants):
        session.add(session_id, request)
    session.run()
    texts = [tuple(session.tokens[i]) for i in range(4)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


def test_targets_reach_the_speculator_whether_the_request_is_drafted_for_or_not():
    class Listening(OracleSpeculator):
        heard: tuple = ()

        def take(self, requests, load=NOTHING_ELSE):
            targets = {request.session_id: request.tpot_target_s for request in requests}
            self.heard = (targets, load.tpot_targets_s)
            return super().take(requests, load)

    session = Session(make_config(), Listening())
    session.add(1, make_request("a", tpot_target_s=0.01))
    session.add(2, make_request("b"))
    session.add(3, make_request("c", tpot_target_s=0.02, speculation=False))
    session.add(4, make_request("d", speculation=False))
    session.step()
    session.step()
    assert session.speculator.heard == ({1: 0.01, 2: None}, (0.02,))

"""Log probabilities are the model's own, whatever happens around a request."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from deployments.engine.errors import InvalidLogitsError
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from deployments.engine.torch_engine.assembly import EngineParts
from deployments.engine.torch_engine.delta_stream import DeltaStream
from deployments.engine.torch_engine.logprobs import ScoredToken, score
from deployments.engine.types import FinishReason, TokenDelta, TokenLogprob
from tests.fakes_engine import (
    CheckedSpeculator,
    FakePageStore,
    HostileSpeculator,
    OracleSpeculator,
    expected,
    make_config,
    make_request,
)
from tests.unit.deployments.engine.torch_engine.test_core_text import Session
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    loaded_model,
    reference_model,
    runner_of,
)

LONG = tuple((7 * i + i * i) % 60 for i in range(200))
ALL = {"num_logprobs": 2, "num_prompt_logprobs": 3}


def run_one(request, speculator=None, **config):
    session = Session(make_config(**config), speculator)
    session.add(1, request)
    session.run()
    return session


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["none", "chain", "tree"])
def test_they_are_raw_however_tokens_are_chosen(draft, temperature):
    request = make_request(
        prompt=LONG,
        max_tokens=50,
        temperature=temperature,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias=((4, 2.0), (9, -100.0)),
        min_tokens=5,
        stop_token_ids=(3,),
        top_k=9,
        **ALL,
    )
    speculator = {"none": None, "chain": OracleSpeculator(), "tree": HostileSpeculator(3)}[draft]
    session = run_one(request, speculator)
    assert tuple(session.tokens[1]) == expected(request).token_ids
    session.assert_logprobs(1, request)


def test_accepted_drafts_are_scored_by_the_rows_that_verified_them():
    request = make_request(max_tokens=40, **ALL)
    speculator = OracleSpeculator()
    session = run_one(request, speculator)
    assert speculator.num_accepted > 25
    session.assert_logprobs(1, request)
    plain = run_one(request)
    assert plain.logprobs == session.logprobs
    assert plain.prompt_logprobs == session.prompt_logprobs


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 128, 200])
def test_prompts_are_scored_chunk_by_chunk(length):
    request = make_request(prompt=LONG[:length], max_tokens=2, num_prompt_logprobs=1)
    session = run_one(request, max_batch_tokens=64)
    session.assert_logprobs(1, request)


def test_a_cached_prefix_is_computed_anew_only_while_it_is_to_be_scored():
    store = FakePageStore()
    for _ in range(2):
        session = Session(speculator=OracleSpeculator(), store=store)
        for session_id, changes in enumerate(({}, ALL, {"num_logprobs": 0}), 1):
            request = make_request(f"r{session_id}", LONG, **changes)
            session.add(session_id, request)
            session.run()
            session.assert_logprobs(session_id, request)
        assert session.ends[2].usage.num_cached_tokens == 0
        assert session.ends[3].usage.num_cached_tokens == 192
    session.assert_all_free()


@pytest.mark.parametrize("period", [1, 2, 3])
def test_preemption_loses_and_repeats_nothing(period):
    session = Session(make_config(max_batch_tokens=100), OracleSpeculator())
    requests = {
        i: make_request(f"r{i}", LONG[: 60 * i], max_tokens=20, temperature=i % 2, **ALL)
        for i in range(1, 4)
    }
    for session_id, request in requests.items():
        session.add(session_id, request)
    scheduler = session.core._scheduler
    for step in range(20 * period):
        session.step()
        # Whoever came last makes room, in its prompt or behind it.
        if step % period == 0 and scheduler.running:
            scheduler._preempt(scheduler.running[-1])
    session.run()
    for session_id, request in requests.items():
        assert tuple(session.tokens[session_id]) == expected(request).token_ids
        session.assert_logprobs(session_id, request)


def test_a_preempted_prompt_is_scored_on_from_where_it_stopped():
    session = Session(make_config(max_batch_tokens=100))
    scored = []
    forward = session.parts.runner.forward

    def counted(batch):
        scored.append(len(batch.logit_rows))
        return forward(batch)

    session.parts.runner.forward = counted
    request = make_request(prompt=LONG, max_tokens=3, speculation=False, **ALL)
    session.add(1, request)
    session.step()
    session.core._scheduler._preempt(session.core._open[1])
    session.run()
    session.assert_logprobs(1, request)
    assert sum(scored) == 199 + 3


@pytest.mark.parametrize("num_resumed", [1, 10])
def test_a_resumed_request_tells_only_what_is_new(num_resumed):
    request = make_request(prompt=LONG, max_tokens=30, **ALL)
    whole = run_one(request)
    resumed = replace(request, resumed_output_ids=tuple(whole.tokens[1][:num_resumed]))
    rest = run_one(resumed, OracleSpeculator())
    assert rest.logprobs[1] == whole.logprobs[1][num_resumed:]
    assert not rest.prompt_logprobs


def test_tokens_dropped_behind_a_stop_are_not_told():
    plain = expected(make_request(max_tokens=40)).token_ids
    request = make_request(max_tokens=40, stop_token_ids=(plain[9],), **ALL)
    session = run_one(request, OracleSpeculator())
    assert session.ends[1].finish_reason is FinishReason.STOP
    assert len(session.logprobs[1]) == len(session.tokens[1]) <= 10
    session.assert_logprobs(1, request)


def test_the_model_scores_no_row_that_nobody_asked_for():
    rows = []
    for changes in ({}, {"num_logprobs": 5}, {"num_prompt_logprobs": 0}):
        session = Session()
        forward = session.parts.runner.forward
        seen = []

        def counted(batch, forward=forward, seen=seen):
            seen.append(len(batch.logit_rows))
            return forward(batch)

        session.parts.runner.forward = counted
        session.add(1, make_request(prompt=LONG, max_tokens=4, **changes))
        session.run()
        rows.append(sum(seen))
    assert rows == [4, 4, 4 + 199]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_that_cannot_be_scored_fails_its_request_alone(max_tokens):
    session = Session()
    session.parts.runner.nan_after_token = 61
    asked = {"num_prompt_logprobs": 0, "max_tokens": max_tokens}
    session.add(1, make_request("r1", [*LONG[:50], 61, *LONG[:9]], **asked))
    session.add(2, make_request("r2", LONG[:40], **asked))
    session.run()
    assert isinstance(session.ends[1], InvalidLogitsError)
    assert not session.tokens[1]
    assert session.ends[2].finish_reason is FinishReason.LENGTH
    session.assert_all_free()


def test_scores_of_excluded_tied_and_invalid_logits():
    logits = torch.tensor([[0.0, 1.0, 1.0, -math.inf], [0.0, math.nan, 0.0, 0.0]])
    tied, excluded, invalid = score(
        logits, [ScoredToken(0, 2, 1), ScoredToken(0, 3, 20), ScoredToken(1, 0, 0)]
    )
    assert (tied.rank, len(tied.top)) == (1, 1)
    assert tied.logprob == pytest.approx(1 - math.log(1 + 2 * math.e))
    assert (excluded.rank, excluded.logprob) == (4, -math.inf)
    assert sorted(token for token, _ in excluded.top) == [0, 1, 2, 3]
    assert math.isnan(invalid.logprob)
    assert score(logits, []) == []


async def test_a_slow_reader_gets_longer_deltas_with_all_of_them():
    stream = DeltaStream()
    first, second = TokenLogprob(5, -1.0, 1), TokenLogprob(6, -2.0, 3)
    stream.push(
        TokenDelta(request_id="r", token_ids=(5,), logprobs=(first,), prompt_logprobs=(None,))
    )
    stream.push(TokenDelta(request_id="r", token_ids=(6,), logprobs=(second,)))
    delta = await stream.next()
    assert delta.logprobs == (first, second)
    assert delta.prompt_logprobs == (None,)


class ForkingSpeculator(CheckedSpeculator):
    """Knows each text, and puts a wrong guess before every right one."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def draft(self, session_id, token_ids, max_draft_tokens):
        tokens, parents, parent = [], [], -1
        for token in self.texts[session_id][len(token_ids) :]:
            if len(tokens) + 2 <= max_draft_tokens:
                tokens += [(token + 1) % 97, token]
                parents += [parent, parent]
                parent = len(tokens) - 1
        return DraftTree(tuple(tokens), tuple(parents), (DraftOrigin.POOL,) * len(tokens))


def real_parts(config, speculator):
    loaded = loaded_model("llama")
    runner = runner_of(loaded, config.num_pages)
    return EngineParts(
        runner=runner,
        memory=runner.kv_cache,
        layout=loaded.page_layout(),
        vocab_size=97,
        max_positions=512,
        eos_token_ids=frozenset(),
        store=None,
        speculator=speculator,
        detokenize=lambda _: "",
    )


def test_they_are_those_of_a_float64_model():
    exact = copy.deepcopy(reference_model("llama")).double()
    config = make_config(max_batch_tokens=64, num_draft_tokens=6)
    requests = {
        session_id: make_request(
            f"r{session_id}",
            [(5 * i + session_id) % 97 for i in range(length)],
            temperature=session_id % 2,
            frequency_penalty=0.4,
            max_tokens=24,
            num_logprobs=4,
            num_prompt_logprobs=2,
        )
        for session_id, length in enumerate((1, 30, 150), 1)
    }

    def run(speculator):
        session = Session(config, speculator, parts=real_parts(config, speculator))
        for session_id, request in requests.items():
            session.add(session_id, request)
        session.run()
        return session

    plain = run(ForkingSpeculator(dict.fromkeys(requests, ())))
    speculator = ForkingSpeculator(
        {i: [*request.prompt_token_ids, *plain.tokens[i]] for i, request in requests.items()}
    )
    drafted = run(speculator)
    assert speculator.num_accepted > 40
    assert drafted.tokens == plain.tokens
    for session in (plain, drafted):
        for session_id, request in requests.items():
            told = [*session.prompt_logprobs[session_id][1:], *session.logprobs[session_id]]
            text = [*request.prompt_token_ids, *session.tokens[session_id]]
            with torch.inference_mode():
                want = exact(torch.tensor([text])).logits[0].log_softmax(dim=1)
            for index, entry in enumerate(told):
                assert entry.token_id == text[index + 1]
                assert entry.logprob == pytest.approx(float(want[index, entry.token_id]), abs=1e-4)
                for token_id, logprob in entry.top:
                    assert logprob == pytest.approx(float(want[index, token_id]), abs=1e-4)

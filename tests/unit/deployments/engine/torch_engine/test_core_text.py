"""Whatever happens around it, a request's text is the one plain decoding gives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import build_core, structure_compiler
from deployments.engine.types import FinishReason, TokenDelta, TokenLogprob
from deployments.engine.validation import validate_request
from tests.fakes_engine import (
    VOCAB_SIZE,
    FakePageStore,
    HostileSpeculator,
    OracleSpeculator,
    WrongSpeculator,
    expected,
    make_config,
    make_parts,
    make_request,
)
from tests.fakes_logprobs import assert_logprobs


class Session:
    """Drives an engine core step by step and keeps what it says."""

    def __init__(self, config=None, speculator=None, store=None, parts=None, **changes):
        self.config = config or make_config()
        self.speculator = speculator or NoSpeculation()
        parts = parts or make_parts(self.config, self.speculator, store)
        self.parts = replace(parts, **changes)
        self.structures = structure_compiler(self.parts)
        self.now = 0.0
        self.is_woken = False
        self.core = build_core(
            self.config,
            self.parts,
            wake=self.wake,
            wall_clock=lambda: self.now,
            monotonic=lambda: self.now,
        )
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprob]] = {}
        self.prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}
        self.ends: dict[int, object] = {}

    def wake(self):
        self.is_woken = True

    def add(self, session_id, request):
        self.tokens[session_id] = []
        self.logprobs[session_id] = []
        structure = request.sampling.structure
        stops = self.core._limits.stop_token_ids(request)
        constraint = self.structures.constraint(structure, stops) if structure else None
        self.core.add(session_id, request, constraint)
        self.collect()

    def step(self):
        has_worked = self.core.step()
        self.collect()
        self.core.check_integrity()
        return has_worked

    def collect(self):
        for session_id, content in self.core.take_events():
            assert session_id not in self.ends, "an event after the terminal one"
            if isinstance(content, TokenDelta):
                if content.prompt_logprobs is not None:
                    assert not self.tokens[session_id]
                    self.prompt_logprobs[session_id] = content.prompt_logprobs
                self.tokens[session_id] += content.token_ids
                self.logprobs[session_id] += content.logprobs
                if content.finish_reason is None:
                    assert content.token_ids
                    continue
            self.ends[session_id] = content

    def run(self, max_steps=20_000):
        for _ in range(max_steps):
            self.is_woken = False
            if not self.step() and not self.is_woken:
                return
        raise AssertionError("the engine does not come to an end")

    def assert_logprobs(self, session_id, request):
        assert_logprobs(
            request,
            self.tokens[session_id],
            self.logprobs[session_id],
            self.prompt_logprobs.get(session_id),
        )

    def assert_all_free(self):
        stats = self.core.stats()
        assert stats.num_free_pages == stats.num_total_pages
        assert stats.num_running == stats.num_waiting == 0


def random_request(rng: random.Random, name: str):
    """Any mix of settings; prompts share prefixes, so that pages are shared too."""
    shared = random.Random(rng.choice((1, 2))).choices(range(VOCAB_SIZE - 1), k=200)  # noqa: S311
    length = rng.choice((1, 5, 63, 64, 65, 128, 130, 190))
    prompt = shared[:length] + rng.choices(range(VOCAB_SIZE - 1), k=rng.choice((0, 0, 9)))
    is_greedy = rng.random() < 0.5
    changes = {
        "max_tokens": rng.choice((1, 2, 7, 40, 70)),
        "seed": rng.getrandbits(64),
        "temperature": 0.0 if is_greedy else rng.choice((0.7, 1.0)),
        "choice_index": rng.choice((0, 0, 3)),
        "priority": rng.choice((0, 0, 0, 1)),
        "ignore_eos": rng.random() < 0.5,
        "speculation": rng.random() < 0.9,
        "tenant_key": bytes([rng.choice((0, 0, 1))]) * 32,
    }
    if rng.random() < 0.3:
        changes |= {"top_k": rng.choice((0, 5)), "top_p": rng.choice((1.0, 0.8)), "min_p": 0.05}
    if rng.random() < 0.3:
        changes |= {
            "repetition_penalty": 1.3,
            "presence_penalty": rng.choice((0.0, 0.5)),
            "frequency_penalty": rng.choice((0.0, 0.4)),
        }
    if rng.random() < 0.2:
        changes |= {"logit_bias": ((4, 2.0), (9, -100.0))}
    if rng.random() < 0.3:
        changes |= {"stop_strings": ("ab", "zq", "c")}
    if rng.random() < 0.2:
        changes |= {"stop_token_ids": (17, 3)}
    if rng.random() < 0.3:
        changes |= {"min_tokens": rng.choice((3, 12))}
    if rng.random() < 0.3:
        changes |= {"num_logprobs": rng.choice((0, 3))}
    if rng.random() < 0.2:
        changes |= {"num_prompt_logprobs": rng.choice((0, 2))}
    if rng.random() < 0.3:
        bad = [tuple(rng.choices(range(VOCAB_SIZE), k=rng.choice((1, 2)))) for _ in range(40)]
        changes |= {"bad_token_sequences": tuple(bad)}
    return make_request(name, prompt or [1], **changes)


def speculator_for(kind: str, seed: int):
    return {
        "none": NoSpeculation,
        "oracle": OracleSpeculator,
        "wrong": WrongSpeculator,
        "hostile": lambda: HostileSpeculator(seed),
    }[kind]()


@pytest.mark.parametrize("kind", ["none", "oracle", "wrong", "hostile"])
@pytest.mark.parametrize("seed", range(6))
def test_text_does_not_depend_on_what_happens_around_it(kind, seed):
    rng = random.Random(f"{kind} {seed}")  # noqa: S311
    store = FakePageStore(answer=rng.choice(("at once", "held", "short", "spoilt", "error")))
    config = make_config(
        num_pages=rng.choice((5, 8, 40)),
        max_batch_tokens=rng.choice((64, 100, 300)),
        max_num_seqs=rng.choice((2, 8)),
        num_draft_tokens=rng.choice((1, 4, 8)),
    )
    session = Session(config, speculator_for(kind, seed), rng.choice((None, store)))
    requests = {}
    aborted = set()
    for _ in range(14):
        session_id = len(requests) + 1
        requests[session_id] = random_request(rng, f"r{session_id}")
        session.add(session_id, requests[session_id])
        for _ in range(rng.choice((0, 1, 3, 10))):
            session.step()
            session.now += 0.01
        if rng.random() < 0.3:
            victim = rng.randint(1, session_id)
            aborted.add(victim)
            session.core.abort(victim)
            session.collect()
        if rng.random() < 0.5:
            store.release_loads()
    while len(session.ends) < len(requests):
        session.now += 60.0
        session.run()
    max_model_len = min(config.max_model_len, config.num_pages * 64)
    for session_id, request in requests.items():
        want = expected(request, max_model_len)
        got = tuple(session.tokens[session_id])
        end = session.ends[session_id]
        session.assert_logprobs(session_id, request)
        if end.finish_reason is FinishReason.ABORT:
            assert session_id in aborted
            assert got == want.token_ids[: len(got)]
            continue
        assert got == want.token_ids
        assert (end.finish_reason, end.stop_match) == (want.finish_reason, want.stop_match)
        assert end.usage.num_output_tokens == len(got)
        assert end.usage.num_tier_cached_tokens <= end.usage.num_cached_tokens
        assert end.usage.num_cached_tokens <= len(request.prompt_token_ids)
    session.assert_all_free()


def test_scenarios_do_preempt():
    """Guards the test above: small pools must really run out of pages."""
    session = Session(make_config(num_pages=5, max_num_seqs=4))
    requests = {i: make_request(f"r{i}", [i] * 60, max_tokens=120) for i in range(1, 4)}
    for session_id, request in requests.items():
        session.add(session_id, request)
    session.run()
    assert session.core.stats().num_preemptions > 0
    for session_id, request in requests.items():
        assert tuple(session.tokens[session_id]) == expected(request).token_ids
    # The first to come is never the one that makes room.
    assert next(iter(session.ends)) == 1


def test_right_drafts_save_steps_and_are_counted():
    request = make_request(max_tokens=40)
    plain, fast = Session(), Session(speculator=OracleSpeculator())
    for session in (plain, fast):
        session.add(1, request)
        session.run()
        assert tuple(session.tokens[1]) == expected(request).token_ids
    assert fast.core.stats().num_steps * 4 < plain.core.stats().num_steps
    spec = fast.ends[1].speculation
    assert spec.num_accepted_draft_tokens == spec.num_draft_tokens == spec.num_accepted_pool_tokens
    assert spec.acceptance_histogram[4] >= 7
    assert sum(spec.acceptance_histogram) == spec.num_spec_steps == spec.num_table_hits
    assert fast.core.stats().speculation == spec
    # The prefill gives the first token; every other one came with or behind a draft.
    assert 1 + spec.num_spec_steps + spec.num_accepted_draft_tokens == 40


def test_wrong_drafts_are_counted_and_cost_no_step():
    request = make_request(max_tokens=20)
    plain, slow = Session(), Session(speculator=WrongSpeculator())
    for session in (plain, slow):
        session.add(1, request)
        session.run()
    assert slow.core.stats().num_steps == plain.core.stats().num_steps
    spec = slow.ends[1].speculation
    assert spec.num_accepted_draft_tokens == 0
    assert spec.acceptance_histogram == (spec.num_spec_steps,)


def test_request_may_refuse_speculation():
    speculator = OracleSpeculator()
    session = Session(speculator=speculator)
    session.add(1, make_request(speculation=False))
    session.run()
    assert not speculator.closed
    assert session.ends[1].speculation.num_draft_tokens == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_resumed", [1, 9, 63, 64, 99])
def test_resumed_request_goes_on_with_the_same_text(temperature, num_resumed):
    request = make_request(
        max_tokens=100, temperature=temperature, frequency_penalty=0.3, stop_strings=("zzzz",)
    )
    want = expected(request)
    session = Session(speculator=OracleSpeculator())
    session.add(1, replace(request, resumed_output_ids=want.token_ids[:num_resumed]))
    session.run()
    assert tuple(session.tokens[1]) == want.token_ids[num_resumed:]
    assert session.ends[1].usage.num_output_tokens == len(want.token_ids)


def test_stop_string_is_found_across_the_seam_of_a_resume():
    plain = expected(make_request(max_tokens=30))
    request = make_request(max_tokens=30, stop_strings=(_text_between(plain.token_ids, 11, 14),))
    session = Session()
    session.add(1, replace(request, resumed_output_ids=plain.token_ids[:12]))
    session.run()
    assert tuple(session.tokens[1]) == expected(request).token_ids[12:]
    assert session.ends[1].finish_reason is FinishReason.STOP


def _text_between(token_ids, start, end):
    from tests.fakes_engine import detokenize

    return detokenize(token_ids[start:end])


def test_resume_of_a_complete_output_only_ends_it():
    request = make_request(max_tokens=6)
    want = expected(request)
    session = Session()
    session.add(1, replace(request, resumed_output_ids=want.token_ids))
    assert session.tokens[1] == []
    assert session.ends[1].finish_reason is FinishReason.LENGTH
    session.core.check_integrity()
    assert session.core.stats().num_steps == 0


def test_context_limit_cuts_max_tokens():
    config = make_config(max_model_len=100)
    request = make_request("r", [1] * 90, max_tokens=50)
    session = Session(config, OracleSpeculator())
    session.add(1, request)
    session.run()
    assert tuple(session.tokens[1]) == expected(request, 100).token_ids
    assert len(session.tokens[1]) == 10
    assert session.ends[1].finish_reason is FinishReason.LENGTH


def test_one_sequence_may_fill_the_whole_pool():
    config = make_config(num_pages=2)
    request = make_request("r", [1] * 100, max_tokens=500)
    session = Session(config, OracleSpeculator())
    session.add(1, request)
    session.run()
    assert len(session.tokens[1]) == 28
    assert tuple(session.tokens[1]) == expected(request, 128).token_ids


def test_batches_keep_to_the_token_budget():
    config = make_config(max_batch_tokens=64, num_draft_tokens=8)
    session = Session(config, HostileSpeculator(3))
    for session_id in range(1, 9):
        request = make_request(f"r{session_id}", [session_id] * 150)
        validate_request(request, session.core._limits)
        session.add(session_id, request)
    session.run()
    assert max(session.parts.runner.batch_sizes) == 64

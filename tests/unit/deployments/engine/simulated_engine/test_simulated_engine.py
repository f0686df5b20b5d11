"""The engine of load tests: its times, its texts, and real drafts over real sockets."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from pydantic import SecretStr, ValidationError

from deployments.engine.config import EngineConfig, SimulatedConfig, SpeculationConfig
from deployments.engine.errors import RequestRejectedError, UnsupportedModelError
from deployments.engine.simulated_engine.core import step_seconds
from deployments.engine.simulated_engine.drafter import SimulatedDrafter
from deployments.engine.simulated_engine.start import start_simulated_engine
from deployments.engine.simulated_engine.text import SimulatedText, read_text
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.types import DraftQuery, DraftSampling, DraftTree
from deployments.engine.types import FinishReason, StructuredOutput, StructureKind
from tests.fakes_engine import make_request

VOCAB_SIZE = 64
EOS = 63
SECRET = SecretStr("s3cret")
TIMES = SimulatedConfig(
    prefill_tokens_per_s=1e6, decode_step_s=((1, 0.002),), draft_batch_s=0, draft_row_s=0
)


def engine_config(**fields) -> EngineConfig:
    speculation = SpeculationConfig(local_drafter="none", fanout=1, num_draft_tokens=2)
    fields = {"kind": "simulated", "simulated": TIMES, "speculation": speculation} | fields
    return EngineConfig(**fields)


@asynccontextmanager
async def running(tmp_path, speculator=None, **fields):
    settings = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096, "eos_token_id": [EOS]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    engine = start_simulated_engine(
        engine_config(**fields),
        tmp_path,
        page_store_factory=None,
        speculator=speculator or NoSpeculation(),
        detokenize=lambda ids: "".join(chr(97 + token % 26) for token in ids),
    )
    try:
        yield engine
    finally:
        await engine.close()


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


def text(deltas):
    return tuple(token for delta in deltas for token in delta.token_ids)


def test_a_step_takes_what_its_prompt_tokens_and_rows_take():
    times = SimulatedConfig(prefill_tokens_per_s=1000, decode_step_s=((1, 0.02), (11, 0.03)))
    assert step_seconds(times, 500, 0) == pytest.approx(0.5)
    assert step_seconds(times, 0, 1) == pytest.approx(0.02)
    assert step_seconds(times, 0, 6) == pytest.approx(0.025)
    assert step_seconds(times, 100, 11) == pytest.approx(0.13)
    assert step_seconds(times, 0, 31) == pytest.approx(0.05)
    level = SimulatedConfig(decode_step_s=((4, 0.5),))
    assert step_seconds(level, 0, 1) == step_seconds(level, 0, 64) == 0.5


@pytest.mark.parametrize(
    "points", [(), ((0, 0.1),), ((2, 0.1), (1, 0.2)), ((1, 0.2), (2, 0.1)), ((1, 0.0),)], ids=repr
)
def test_times_that_no_machine_has_are_refused(points):
    with pytest.raises(ValidationError):
        SimulatedConfig(decode_step_s=points)


def test_settings_of_another_engine_are_refused():
    with pytest.raises(ValidationError, match="simulated has settings, but kind is torch"):
        EngineConfig(simulated=TIMES)
    with pytest.raises(ValidationError, match="weights is a setting of kind: torch"):
        EngineConfig(kind="simulated", weights="int8")
    assert EngineConfig(kind="simulated").takes_drafts


async def test_the_text_hangs_on_prompt_seed_and_choice_alone(tmp_path):
    async with running(tmp_path) as engine:
        one = make_request("a", max_tokens=20, temperature=1.0)
        first = text(await collect(engine, one))
        assert EOS not in first
        assert text(await collect(engine, one)) == first
        assert text(await collect(engine, replace(one, choice_index=1))) != first
        other_seed = replace(one, sampling=replace(one.sampling, seed=one.sampling.seed + 1))
        assert text(await collect(engine, other_seed)) != first
        greedy = [replace(each.sampling, temperature=0.0) for each in (one, other_seed)]
        texts = {text(await collect(engine, replace(one, sampling=each))) for each in greedy}
        assert len(texts) == 1


async def test_a_stop_string_ends_an_output_where_it_is_complete(tmp_path):
    async with running(tmp_path) as engine:
        request = make_request("a", max_tokens=20)
        whole = text(await collect(engine, request))
        letters = "".join(chr(97 + token % 26) for token in whole)
        stopped = replace(request, sampling=replace(request.sampling, stop_strings=(letters[4:7],)))
        deltas = await collect(engine, stopped)
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert deltas[-1].stop_match == letters[4:7]
        assert len(text(deltas)) <= 7


@pytest.mark.parametrize(
    "changes",
    [
        {"num_logprobs": 1},
        {"num_prompt_logprobs": 1},
        {"logit_bias": ((1, 2.0),)},
        {"bad_token_sequences": ((1,),)},
        {"structure": StructuredOutput(kind=StructureKind.REGEX, text="a")},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_what_needs_a_model_is_refused(tmp_path, changes):
    async with running(tmp_path) as engine:
        request = make_request("a")
        with pytest.raises(RequestRejectedError, match="has no model"):
            await collect(engine, replace(request, sampling=replace(request.sampling, **changes)))
        assert text(await collect(engine, request))


async def test_pages_that_are_used_up_let_requests_wait_and_lose_none(tmp_path):
    async with running(tmp_path, num_pages=4, max_num_seqs=8, max_model_len=256) as engine:
        requests = [make_request(f"r{i}", [i] * 70, max_tokens=80) for i in range(6)]
        alone = text(await collect(engine, requests[0]))
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert all(len(text(deltas)) == 80 for deltas in together)
        assert text(together[0]) == alone
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_total_pages == 4
        assert stats.num_backlog_tokens == 0


def test_a_folder_without_a_vocabulary_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="vocab_size"):
        read_text(tmp_path)


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_guesses_are_right_as_often_as_they_are_meant_to_be(acceptance):
    simulated = SimulatedText(49152, frozenset({2}))
    config = TIMES.model_copy(update={"draft_acceptance": acceptance})
    drafter = SimulatedDrafter(config, simulated)
    sampling = DraftSampling(seed=7, temperature=1.0)
    right, committed = 0, [5]
    for _ in range(2000):
        truth = simulated.next_token(7, 0, len(committed), committed[-1])
        query = DraftQuery(
            session_id=1,
            token_ids=committed,
            in_flight=DraftTree(),
            num_draft_tokens=0,
            fanout=2,
            sampling=sampling,
        )
        ((first, second),) = drafter.propose([query])
        assert first.bonus_token_id != second.bonus_token_id
        right += first.bonus_token_id == truth
        committed.append(truth)
    assert right / 2000 == pytest.approx(acceptance, abs=0.05)


async def test_drafts_of_a_real_server_shorten_the_way_and_change_no_token(tmp_path):
    identity = Identity(model="m", vocab_size=VOCAB_SIZE, vocab_digest="d")
    simulated = SimulatedText(VOCAB_SIZE, frozenset({EOS}))
    always = TIMES.model_copy(update={"draft_acceptance": 1.0})
    server = DraftServer(SimulatedDrafter(always, simulated), identity, SECRET)
    endpoint = f"127.0.0.1:{server.start()}"
    config = engine_config().speculation
    speculator = SplitSpeculator(
        config, vocab_size=VOCAB_SIZE, connect=grpc_connector(identity, "t", SECRET)
    )
    try:
        async with running(tmp_path, speculator) as engine:
            request = make_request("plain", max_tokens=300, temperature=1.0)
            plain = text(await collect(engine, replace(request, speculation=False)))
            async with asyncio.timeout(60):
                # A stream takes a while to open; requests until then draft nothing.
                for number in range(1000):
                    named = replace(request, request_id=f"r{number}")
                    speculator.attach(named.request_id, endpoint)
                    deltas = await collect(engine, named)
                    speculator.detach(named.request_id)
                    assert text(deltas) == plain
                    if deltas[-1].speculation.num_accepted_pool_tokens:
                        break
            spec = deltas[-1].speculation
            assert spec.num_accepted_draft_tokens == spec.num_accepted_pool_tokens
            assert spec.num_draft_tokens == spec.num_accepted_draft_tokens
            assert server.stats().num_rows > 0
    finally:
        server.close()

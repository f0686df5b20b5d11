"""Hidden states come once per row, in text order, whatever happens around the request."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from deployments.engine.embedding import EmbeddingRequest, Pooling, pooled
from deployments.engine.errors import EngineError, InvalidLogitsError, RequestRejectedError
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import build_core, model_limits, start_engine
from deployments.engine.types import FINAL_NORM, CaptureSpec, FinishReason, TokenDelta
from deployments.engine.validation import validate_request
from tests.fakes_engine import (
    HostileSpeculator,
    OracleSpeculator,
    WrongSpeculator,
    expected,
    make_config,
    make_parts,
    make_request,
)
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    loaded_model,
    parts_of,
    reference_model,
)


class Reader:
    """What one request's reader has got."""

    def __init__(self, request):
        self.request = request
        self.token_ids = []
        self.rows = []
        self.first_row = None
        self.end = None

    def push(self, content):
        assert self.end is None, "an event after the terminal one"
        if not isinstance(content, TokenDelta):
            self.end = content
            return
        self.token_ids += content.token_ids
        states = content.hidden_states
        if states is not None:
            if self.first_row is None:
                self.first_row = states.first_row
            assert states.first_row == self.first_row + len(self.rows)
            self.rows += list(states.values.swapaxes(0, 1))
        elif content.finish_reason is None:
            assert content.token_ids
        if content.finish_reason is not None:
            self.end = content


def drive(config, parts, requests, rng=None):
    """Serve requests that arrive one after the other."""
    core = build_core(config, parts, wake=lambda: None)
    readers = {}

    def step():
        has_worked = core.step()
        for session_id, content in core.take_events():
            readers[session_id].push(content)
        core.check_integrity()
        return has_worked

    for session_id, request in enumerate(requests, 1):
        validate_request(request, model_limits(config, parts))
        readers[session_id] = Reader(request)
        core.add(session_id, request)
        for _ in range(rng.choice((0, 1, 5)) if rng else 0):
            step()
    while step():
        pass
    stats = core.stats()
    assert stats.num_free_pages == stats.num_total_pages
    return list(readers.values()), stats


def check_rows(reader):
    """The fake model's features name their token and position."""
    request, layers = reader.request, reader.request.capture.layers
    text = [*request.prompt_token_ids, *request.resumed_output_ids, *reader.token_ids]
    num_old = len(text) - len(reader.token_ids)
    first = 0 if request.capture.includes_prompt else num_old - 1
    last = len(text) - 1 if request.sampling.max_tokens else len(text)
    assert reader.first_row == first
    want = [[(1000 * layer + text[i], i) for layer in layers] for i in range(first, last)]
    assert np.array_equal(np.array(reader.rows), np.array(want, dtype=np.float32))


@pytest.mark.parametrize("speculator", [NoSpeculation, OracleSpeculator, WrongSpeculator, None])
@pytest.mark.parametrize("seed", range(2))
def test_every_row_comes_once_and_in_order(speculator, seed):
    rng = random.Random(seed)  # noqa: S311
    config = make_config(
        num_pages=rng.choice((6, 40)), max_batch_tokens=64, num_draft_tokens=rng.choice((2, 8))
    )
    requests = []
    for index in range(6):
        prompt = [7] * rng.choice((1, 64, 100, 150)) + rng.choices(range(60), k=rng.choice((0, 5)))
        layers = rng.choice(((0,), (1, FINAL_NORM), (FINAL_NORM, 0, 1)))
        capture = CaptureSpec(layers=layers, includes_prompt=rng.random() < 0.5)
        requests.append(
            make_request(
                f"r{index}",
                prompt,
                max_tokens=rng.choice((0, 1, 30, 70)) if index % 3 else 20,
                temperature=rng.choice((0.0, 1.0)),
                ignore_eos=rng.random() < 0.5,
                capture=capture if index % 3 else None,
            )
        )
    parts = make_parts(config, HostileSpeculator(seed) if speculator is None else speculator())
    readers, _ = drive(config, parts, requests, rng)
    for reader in readers:
        if reader.request.sampling.max_tokens:
            assert tuple(reader.token_ids) == expected(reader.request, 6 * 64).token_ids
        else:
            assert not reader.token_ids
            assert reader.end.finish_reason is FinishReason.LENGTH
        if reader.request.capture is None:
            assert not reader.rows
        else:
            check_rows(reader)


def test_rows_computed_again_after_a_preemption_are_not_delivered_again():
    config = make_config(num_pages=5, max_num_seqs=4)
    requests = [
        make_request(f"r{i}", [i] * 60, max_tokens=120, capture=CaptureSpec(layers=(0,)))
        for i in range(1, 4)
    ]
    readers, stats = drive(config, make_parts(config, OracleSpeculator()), requests)
    assert stats.num_preemptions > 0
    for reader in readers:
        check_rows(reader)


def test_cached_rows_are_computed_again_only_for_those_who_want_them():
    prompt = list(range(50)) * 4
    capture = CaptureSpec(layers=(0,), includes_prompt=False)
    requests = [
        make_request("a", prompt),
        make_request("b", prompt, capture=capture),
        make_request("c", prompt, capture=CaptureSpec(layers=(0,))),
        make_request("d", prompt, max_tokens=0, capture=capture),
    ]
    config = make_config(max_num_seqs=1)
    (_, *readers), _ = drive(config, make_parts(config, NoSpeculation()), requests)
    assert [reader.end.usage.num_cached_tokens for reader in readers] == [192, 0, 192]
    for reader in readers:
        check_rows(reader)


def test_a_resumed_request_delivers_the_rows_of_new_tokens():
    request = make_request(max_tokens=30)
    resumed = make_request(
        max_tokens=30,
        resumed_output_ids=expected(request).token_ids[:11],
        capture=CaptureSpec(layers=(1,), includes_prompt=False),
    )
    config = make_config()
    (reader,), _ = drive(config, make_parts(config, OracleSpeculator()), [resumed])
    assert len(reader.rows) == len(reader.token_ids) == 19
    check_rows(reader)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (make_request(capture=CaptureSpec(layers=())), "must name layers"),
        (make_request(capture=CaptureSpec(layers=(1, 1))), "each once"),
        (make_request(capture=CaptureSpec(layers=(2,))), "Layer 2 .* 1 layers"),
        (make_request(capture=CaptureSpec(layers=(-2,))), "Layer -2"),
    ],
)
def test_what_cannot_be_captured_is_refused(request_, named):
    config = make_config()
    limits = model_limits(config, make_parts(config, NoSpeculation()))
    with pytest.raises(RequestRejectedError, match=named):
        validate_request(request_, limits)


TEXT = torch.randint(97, (150,), generator=torch.Generator().manual_seed(5)).tolist()


@torch.inference_mode()
def reference_states(name, token_ids):
    """transformers' own list; its last entry lies behind the final norm."""
    model = reference_model(name)
    states = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states]


def test_states_are_those_of_transformers():
    requests = [
        make_request(f"r{n}", TEXT[:n], capture=CaptureSpec(layers=(2, 0, FINAL_NORM)))
        for n in (150, 3, 130)
    ]
    config = make_config(max_batch_tokens=64)
    readers, _ = drive(config, parts_of(loaded_model("qwen3"), config), requests)
    for reader in readers:
        text = [*reader.request.prompt_token_ids, *reader.token_ids]
        states = reference_states("qwen3", text[:-1])
        want = np.stack([states[2], states[0], states[-1]], axis=1)
        np.testing.assert_allclose(np.array(reader.rows), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("normalize", [True, False])
async def test_embeddings_are_pooled_final_states(pooling, normalize):
    config = make_config(max_batch_tokens=64)
    engine = start_engine(config, parts_of(loaded_model(), config))
    try:
        for index in range(2):  # the second time over cached pages
            request = EmbeddingRequest(
                request_id=f"e{index}",
                prompt_token_ids=tuple(TEXT),
                pooling=pooling,
                normalize=normalize,
            )
            embedding = await engine.embed(request)
            rows = reference_states("llama", TEXT)[-1]
            want = rows.mean(axis=0) if pooling is Pooling.MEAN else rows[-1]
            if normalize:
                want = want / np.linalg.norm(want)
            np.testing.assert_allclose(embedding.values, want, rtol=1e-3, atol=1e-4)
            assert embedding.values.dtype == np.float32
            assert embedding.usage.num_prompt_tokens == 150
            is_reused = index == 1 and pooling is Pooling.LAST
            assert embedding.usage.num_cached_tokens == (128 if is_reused else 0)
        longest = EmbeddingRequest(request_id="long", prompt_token_ids=(5,) * 512)
        assert (await engine.embed(longest)).usage.num_prompt_tokens == 512
        too_long = EmbeddingRequest(request_id="long", prompt_token_ids=(5,) * 513)
        with pytest.raises(RequestRejectedError, match="maximum context length is 512"):
            await engine.embed(too_long)
    finally:
        await engine.close()


async def test_an_aborted_embedding_and_one_without_numbers_are_errors():
    request = EmbeddingRequest(request_id="e", prompt_token_ids=(1, 2))

    async def deltas(reason, value):
        states = None
        if value is not None:
            config = make_config()
            captured = request.as_generation()
            (reader,), _ = drive(config, make_parts(config, NoSpeculation()), [captured])
            states = reader.end.hidden_states
            states.values[0, 1] = value
        yield TokenDelta(request_id="e", token_ids=(), finish_reason=reason, hidden_states=states)

    with pytest.raises(EngineError, match="aborted"):
        await pooled(request, deltas(FinishReason.ABORT, None))
    with pytest.raises(InvalidLogitsError):
        await pooled(request, deltas(FinishReason.LENGTH, np.nan))

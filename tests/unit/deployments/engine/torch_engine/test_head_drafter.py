"""A head beside the model drafts what it was trained to, and never changes a text."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from deployments.engine.config import SpeculationConfig
from deployments.engine.errors import WeightsMismatchError
from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.types import DraftQuery, DraftSampling, DraftTree, OutcomeRow
from deployments.engine.torch_engine.capture import joined
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.head_drafter import FinalRows, HeadDrafter
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.weights.eagle3 import load_head
from deployments.engine.training.checkpoint import save_head
from deployments.engine.training.initial import random_head, start_from_target
from deployments.engine.types import CaptureSpec
from tests.eagle3_inference import drafted_one_by_one
from tests.fakes_engine import make_config, make_request
from tests.unit.deployments.engine.torch_engine.test_core_text import Session
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model, parts_of
from tests.unit.deployments.engine.training.tiny_training import (
    batch,
    head,
    objective,
    scale,
    target,
    texts,
)

STEPS = 4
K = 4


@functools.cache
def trained():
    """Fitted to the target, then fifty steps of training."""
    fitted = head()
    start_from_target(fitted, target().model, texts(), scale())
    trained_objective = objective(fitted)
    whole = batch(12)
    optimizer = torch.optim.Adam(trained_objective.parameters(), lr=2e-3)
    for _ in range(50):
        optimizer.zero_grad()
        trained_objective(whole, trained_objective.count(whole)).loss.backward()
        optimizer.step()
    return trained_objective.trained(trained_objective.state_dict())


@pytest.fixture
def folder(tmp_path):
    """Builds the folder of a head."""

    def write(a_head):
        save_head(a_head, tmp_path, torch.float32)
        return tmp_path

    return write


def drafter_of(folder, num_pages=32):
    return HeadDrafter(load_head(folder, target().model), target().model, num_pages)


@torch.no_grad()
def test_logits_are_those_of_step_by_step_inference(folder):
    a_head, text, embedding = head(), texts()[0], target().model.embed_tokens.weight
    loaded = load_head(folder(a_head), target().model)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    fused = loaded.fuse(text.features.float())
    for at in (0, 7, 20):
        cache = KVCache(loaded.config.layer, 1, dtype=torch.float32)
        rows = torch.arange(at)
        loaded.write_rows(
            embedding[text.token_ids[1 : at + 1]], fused[:at], rows, slots[:at], cache
        )
        feature = fused[at : at + 1]
        for row, expected in enumerate(
            drafted_one_by_one(a_head, embedding, text, at, STEPS), start=at
        ):
            one = ForwardBatch(
                token_ids=torch.zeros(1),
                positions=torch.tensor([row]),
                slots=slots[row : row + 1],
                spans=(SequenceSpan(start=0, length=1, kv_slots=slots[: row + 1]),),
                logit_rows=torch.zeros(1),
            )
            feature = loaded(embedding[text.token_ids[row + 1 : row + 2]], feature, one, cache)
            got = loaded.logits(feature)[0]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(loaded.draft_token_ids, a_head.draft_token_ids)


class FakeSequence:
    def __init__(self, session_id, pages):
        self.session_id = session_id
        self.num_slots = 64 * len(pages)
        self._slots = torch.cat([torch.arange(64) + 64 * page for page in pages])

    def slots(self, start, end):
        return self._slots[start:end]


def read_all(drafter, sequence, text, cuts):
    """Read a text in pieces, as prefill chunks and steps would."""
    layers = drafter.capture_layers
    for start, end in pairwise(cuts):
        features = dict(zip(layers, text.features.float().chunk(3, dim=-1), strict=True))
        tokens = text.token_ids[start + 1 : end + 1].tolist()
        drafter.read(features, [FinalRows(sequence, start, list(range(start, end)), tokens)])


def query(session_id, token_ids, k=K, temperature=0.0):
    sampling = DraftSampling(seed=9, temperature=temperature)
    return DraftQuery(
        session_id=session_id,
        token_ids=token_ids,
        in_flight=DraftTree(),
        num_draft_tokens=k - 1,
        fanout=1,
        sampling=sampling,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_is_what_the_reference_would_choose(folder, temperature):
    a_head, embedding = trained(), target().model.embed_tokens.weight
    drafter = drafter_of(folder(a_head))
    lengths = [12, 20, 27]
    for number, (text, length) in enumerate(zip(texts(), lengths, strict=False)):
        read_all(drafter, FakeSequence(number, [number]), text, [0, 5, 9, length - 1])
    queries = [
        query(number, texts()[number].token_ids[:length].tolist(), K - number, temperature)
        for number, length in enumerate(lengths)
    ]
    for number, (rows, asked) in enumerate(zip(drafter.propose(queries), queries, strict=True)):
        [row] = rows
        chain = [row.bonus_token_id, *row.draft_token_ids]
        assert len(chain) == K - number
        at = len(asked.token_ids) - 2
        fed = texts()[number]._replace(token_ids=torch.tensor([*asked.token_ids, *chain]))
        steps = drafted_one_by_one(a_head, embedding, fed, at, len(chain))
        for step, (logits, token) in enumerate(zip(steps, chain, strict=True)):
            scores = torch.full((97,), -torch.inf).index_copy(0, a_head.draft_token_ids, logits)
            if temperature:
                key = row_key(9, 0, len(asked.token_ids) + step)
                scores = scores.log_softmax(0).double() + gumbel([key], torch.arange(97))[0]
            assert token == int(scores.argmax())


def test_what_was_not_read_to_its_end_is_not_drafted(folder):
    drafter = drafter_of(folder(head()))
    text = texts()[0]
    ids = text.token_ids.tolist()
    read_all(drafter, FakeSequence(1, [0]), text, [0, 9])
    [known, longer, shorter, unknown] = drafter.propose(
        [query(1, ids[:10]), query(1, ids[:11]), query(1, ids[:9]), query(2, ids[:10])]
    )
    assert isinstance(known[0], OutcomeRow)
    assert longer == shorter == unknown == []
    beside = replace(query(1, ids[:10]), in_flight=DraftTree.chain((5,), "head"))
    assert drafter.propose([beside]) == [[]]
    drafter.close(1)
    assert drafter.propose([query(1, ids[:10])]) == [[]]


def test_rows_of_a_page_that_was_given_away_are_not_seen(folder):
    drafter = drafter_of(folder(trained()))
    first, second = texts()[:2]
    ids = second.token_ids.tolist()
    read_all(drafter, FakeSequence(1, [3]), second, [0, 9])
    [expected] = drafter.propose([query(1, ids[:10])])
    # Another text's rows in the same page, and this one's behind them.
    read_all(drafter, FakeSequence(2, [4]), first, [0, 5])
    read_all(drafter, FakeSequence(3, [4]), second, [5, 9])
    stale = drafter._begin(0, query(3, ids[:10])).num_seen
    drafter.forget_page(4)
    read_all(drafter, FakeSequence(3, [4]), second, [5, 9])
    assert (stale, drafter._begin(0, query(3, ids[:10])).num_seen) == (8, 3)
    read_all(drafter, FakeSequence(3, [4]), second, [0, 5])
    read_all(drafter, FakeSequence(3, [4]), second, [5, 9])
    assert drafter.propose([query(3, ids[:10])]) == [expected]


@pytest.mark.parametrize(
    ("name", "reason"), [("llama", r"reads layers \(1, 2, 2\)|12"), ("llama-of-24-tokens", "24")]
)
def test_a_head_of_another_target_is_refused(folder, name, reason):
    path = folder(head())
    other = loaded_model(name).model
    if name == "llama":
        other.config = replace(other.config, num_layers=2)
    with pytest.raises(WeightsMismatchError, match=reason):
        load_head(path, other)


def test_a_head_of_another_width_is_refused(folder):
    other = loaded_model("llama-of-6-layers").model
    other.config = replace(other.config, hidden_size=128)
    with pytest.raises(WeightsMismatchError, match="hidden size of 64, not 128"):
        load_head(folder(head()), other)


def session_of(folder, a_head=None, **changes):
    """An engine; with a head, everything that it drafts is verified."""
    config = make_config(num_draft_tokens=K, **changes)
    if a_head is None:
        return Session(config, parts=parts_of(target(), config))
    speculator = SplitSpeculator(
        SpeculationConfig(num_draft_tokens=K, local_drafter="none"),
        vocab_size=97,
        clock=lambda: 0.0,
    )
    parts = parts_of(target(), config, speculator)
    return Session(
        config, speculator, parts=replace(parts, head=drafter_of(folder(a_head), config.num_pages))
    )


def requests(temperature, lengths=(5, 90, 33, 64), **changes):
    generator = torch.Generator().manual_seed(8)
    return [
        make_request(
            f"r{number}",
            torch.randint(3, 97, (length,), generator=generator).tolist(),
            temperature=temperature,
            top_p=0.9 if number % 2 else 1.0,
            seed=50 + number,
            **{"max_tokens": 40} | changes,
        )
        for number, length in enumerate(lengths)
    ]


def answers(session, asked, *, at_once=True):
    for number, request in enumerate(asked):
        session.add(number, request)
        if not at_once:
            session.run()
    session.run()
    session.assert_all_free()
    return [session.tokens[number] for number in range(len(asked))]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("make_head", [head, trained])
def test_a_head_never_changes_a_text(folder, make_head, temperature, at_once):
    asked = requests(temperature)
    plain = answers(session_of(folder), asked, at_once=False)
    # Prompts are longer than a step's budget, so that they are read in chunks.
    session = session_of(folder, make_head(), max_batch_tokens=64)
    assert answers(session, asked, at_once=at_once) == plain
    stats = session.core.stats().speculation
    assert stats.num_draft_tokens > 20
    assert stats.num_accepted_head_tokens == stats.num_accepted_draft_tokens
    assert session.speculator.stats().num_head_draft_tokens == stats.num_draft_tokens
    assert session.parts.head._last == {}


def test_a_head_that_fails_costs_no_request(folder, monkeypatch):
    asked = requests(1.0)
    plain = answers(session_of(folder), asked)
    session = session_of(folder, trained())
    reader = session.parts.head
    fuse, num_calls = reader._head.fuse, 0

    def fails_later(features):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 6:
            raise RuntimeError("out of memory")
        return fuse(features)

    monkeypatch.setattr(reader._head, "fuse", fails_later)
    assert answers(session, asked) == plain
    assert reader.is_off
    assert num_calls == 7
    assert reader._last == {}


def written_by_the_target():
    """Prompts the head was trained on, cut short: what follows is known to it."""
    return [
        make_request(f"t{number}", text.token_ids[:5].tolist(), max_tokens=24)
        for number, text in enumerate(texts())
    ]


def test_a_trained_head_is_accepted_more_often(folder):
    accepted = []
    for a_head in (head(), trained()):
        session = session_of(folder, a_head)
        answers(session, written_by_the_target())
        stats = session.core.stats().speculation
        accepted.append(stats.num_accepted_head_tokens / stats.num_spec_steps)
    assert accepted[1] > accepted[0] + 0.3


def test_cached_prefixes_bring_the_head_s_rows(folder):
    [request] = requests(0.0, lengths=(150,))
    session = session_of(folder, trained())
    drafter, first_drafts = session.parts.head, {}
    propose = drafter.propose

    def spied(queries):
        answers_to = propose(queries)
        for one, rows in zip(queries, answers_to, strict=True):
            # How long a draft is asked for depends on what was learned; its tokens do not.
            first_drafts.setdefault(one.session_id, rows[0].bonus_token_id)
            assert drafter._begin(0, one).num_seen == len(one.token_ids) - 2
        return answers_to

    drafter.propose = spied
    answers(session, [request])
    session.add(7, replace(request, request_id="again"))
    session.run()
    cached = [session.ends[number].usage.num_cached_tokens for number in (0, 7)]
    assert cached == [0, 128]
    assert session.tokens[7] == session.tokens[0]
    assert first_drafts[7] == first_drafts[0]


def test_prefixes_that_the_head_has_not_read_change_no_text(folder):
    asked = requests(0.0, lengths=(150, 150))
    session = session_of(folder, trained())
    unread = [replace(request, speculation=False) for request in asked]
    assert answers(session, unread) == answers(session_of(folder), asked)
    assert not session.parts.head._has_row.any()
    for number, request in enumerate(asked):
        session.add(10 + number, replace(request, request_id=f"again{number}"))
    session.run()
    assert session.tokens[10] == session.tokens[0]
    assert session.ends[10].usage.num_cached_tokens == 128
    assert session.ends[10].speculation.num_draft_tokens > 0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 11])
def test_an_aborted_sequence_leaves_nothing(folder, num_steps):
    session = session_of(folder, head(), max_batch_tokens=64)
    for number, request in enumerate(requests(1.0)):
        session.add(number, request)
    for _ in range(num_steps):
        session.step()
    for number in range(4):
        session.core.abort(number)
    session.run()
    session.assert_all_free()
    assert session.parts.head._last == {}


def test_preempted_sequences_are_read_again(folder):
    asked = requests(0.0, lengths=(60, 60, 60), max_tokens=120)
    plain = answers(session_of(folder), asked, at_once=False)
    # Each needs three pages in the end; there are five.
    session = session_of(folder, trained(), num_pages=5, max_num_seqs=4)
    assert answers(session, asked) == plain
    stats = session.core.stats()
    assert stats.num_preemptions > 0
    assert stats.speculation.num_accepted_head_tokens > 0


def test_hidden_states_are_handed_out_beside_a_head(folder):
    [request] = requests(0.0, lengths=(20,))
    request = replace(request, capture=CaptureSpec(layers=(0, 3, 6), includes_prompt=True))
    kept = []
    for session in (session_of(folder), session_of(folder, trained())):
        session.add(0, request)
        parts = []
        while session.core.step():
            parts += [event.content.hidden_states for event in session.core.take_events()]
        kept.append(joined([part for part in parts if part is not None]).values)
    np.testing.assert_allclose(kept[0], kept[1], atol=1e-4)


def test_random_heads_of_any_seed_change_no_text(folder):
    asked = requests(1.0, lengths=(9,))
    plain = answers(session_of(folder), asked)
    ids = head().draft_token_ids
    for seed in range(4):
        a_head = random_head(head().config, ids, seed)
        assert answers(session_of(folder, a_head), asked) == plain

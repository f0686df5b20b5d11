from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from deployments.engine.errors import InvalidLogitsError
from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.speculation.types import (
    DraftOrigin,
    DraftQuery,
    DraftSampling,
    DraftTree,
    OutcomeRow,
)
from deployments.engine.torch_engine import lm_drafter
from deployments.engine.torch_engine.connected import DraftHead
from deployments.engine.torch_engine.lm_drafter import CausalLMDrafter
from deployments.engine.torch_engine.sampling_math import process_logits
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    batch_of,
    loaded_model,
    runner_of,
)

GREEDY = DraftSampling(seed=1)
SAMPLED = DraftSampling(seed=77, choice_index=1, temperature=1.0)
FILTERED = DraftSampling(seed=5, temperature=0.8, top_k=30, top_p=0.9, min_p=0.02)
CHAIN = DraftTree.chain((5, 6, 7), DraftOrigin.POOL)
BRANCHY = DraftTree((5, 6, 7, 8, 9), (-1, -1, 0, 0, 2))
EMPTY = DraftTree()
TEXT = torch.randint(97, (300,), generator=torch.Generator().manual_seed(5)).tolist()


def drafter_of(loaded=None, **told):
    """One that looks behind every outcome, however unlikely: a tiny model is sure of nothing."""
    return CausalLMDrafter(loaded or loaded_model(), **{"least_chance": 0.0, **told})


def query(length, tree=EMPTY, sampling=GREEDY, *, session=1, k=3, fanout=2, shift=0):
    return DraftQuery(
        session_id=session,
        token_ids=tuple(TEXT[shift : shift + length]),
        in_flight=tree,
        num_draft_tokens=k,
        fanout=fanout,
        sampling=sampling,
    )


class Target:
    """The same model, without cache: chooses as the target's sampler does, among some tokens."""

    def __init__(self, vocabulary=None):
        self.runner = runner_of(loaded_model())
        self.others = torch.ones(97, dtype=torch.bool)
        self.others[slice(None) if vocabulary is None else vocabulary] = False

    def scores(self, text, sampling):
        slots = range(len(text))
        batch = batch_of((list(text), slots, slots, [], None), logit_rows=[len(text) - 1])
        scores = process_logits(
            self.runner.forward(batch).masked_fill(self.others, -torch.inf),
            [sampling.temperature],
            [sampling.top_k],
            [sampling.top_p],
            [sampling.min_p],
        ).double()
        if sampling.temperature > 0:
            key = row_key(sampling.seed, sampling.choice_index, len(text))
            scores = scores + gumbel([key], torch.arange(scores.shape[1]))
        return scores[0]

    def expected_rows(self, asked):
        """(node, bonus) -> draft, by reading every path as a text of its own."""
        return {
            outcome: tuple(token for token, _ in draft)
            for outcome, (_, draft) in self.expected_chances(asked).items()
        }

    def expected_chances(self, asked):
        """(node, bonus) -> its log likelihood, and every token behind it with its own."""
        rows = {}
        for likelihood, node, bonus in self.likeliest_outcomes(asked):
            text, draft = [*self.path(asked, node), bonus], []
            for _ in range(asked.num_draft_tokens):
                best = self.scores(text, asked.sampling).log_softmax(0).max(0)
                text.append(int(best.indices))
                draft.append((text[-1], float(best.values)))
            rows[node, bonus] = (likelihood, draft)
        return rows

    def path(self, asked, node):
        tree = asked.in_flight
        return [*asked.token_ids, *(tree.token_ids[n] for n in tree.path_to(node))]

    def likeliest_outcomes(self, asked):
        """(log likelihood, node, bonus), F for every place where the draft may end."""
        tree = asked.in_flight
        reached, found = {-1: 0.0}, []
        for node in range(-1, len(tree)):
            chances = self.scores(self.path(asked, node), asked.sampling).log_softmax(0)
            for other, parent in enumerate(tree.parents):
                if parent == node:
                    is_known = not self.others[tree.token_ids[other]]
                    chance = float(chances[tree.token_ids[other]]) if is_known else -3.0
                    reached[other] = reached[node] + chance
                    chances[tree.token_ids[other]] = -torch.inf
            found += [
                (reached[node] + chance, node, bonus)
                for bonus, chance in enumerate(chances.tolist())
                if reached[node] + chance > -torch.inf
            ]
        return sorted(found, reverse=True)[: asked.fanout * (len(tree) + 1)]


@pytest.fixture(scope="module")
def target():
    return Target()


def as_table(rows):
    table = {(row.node, row.bonus_token_id): row.draft_token_ids for row in rows}
    assert len(table) == len(rows)
    return table


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, FILTERED])
@pytest.mark.parametrize("tree", [EMPTY, CHAIN, BRANCHY])
def test_the_targets_own_model_foresees_every_outcome(target, tree, sampling):
    drafter = drafter_of(num_pages=8)
    asked = query(40, tree, sampling)
    assert as_table(drafter.propose([asked])[0]) == target.expected_rows(asked)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_every_token_comes_with_its_chance(target, sampling):
    asked = query(40, CHAIN, sampling)
    expected = target.expected_chances(asked)
    for row in drafter_of(num_pages=8).propose([asked])[0]:
        likelihood, draft = expected[row.node, row.bonus_token_id]
        scores = target.scores(target.path(asked, row.node), sampling)
        first = float(scores.log_softmax(0)[row.bonus_token_id])
        assert first >= likelihood
        chances = [first, *(chance for _, chance in draft)]
        assert row.chances == pytest.approx([math.exp(chance) for chance in chances], rel=1e-3)


def test_what_is_hardly_reached_is_not_looked_behind(target):
    asked = query(40, BRANCHY, SAMPLED, k=4, fanout=4)
    expected, lengths = target.expected_chances(asked), set()
    for least in (0.001, 0.01, 0.1):
        rows = drafter_of(num_pages=8, least_chance=least).propose([asked])[0]
        for row in rows:
            likelihood, draft = expected[row.node, row.bonus_token_id]
            reached = itertools.accumulate((chance for _, chance in draft), initial=likelihood)
            length = sum(chance >= math.log(least) for chance in list(reached)[:-1])
            assert row.draft_token_ids == tuple(token for token, _ in draft)[:length]
            lengths.add(length)
    assert len(lengths) > 2


def test_drafts_end_in_time_but_have_one_token(monkeypatch):
    """A forward takes a second, of a clock that only forwards move."""
    now = [100.0]
    monkeypatch.setattr(lm_drafter.time, "monotonic", lambda: now[0])
    drafter = drafter_of(num_pages=8)
    forward = drafter._forward

    def slow(parts):
        now[0] += 1.0
        return forward(parts)

    monkeypatch.setattr(drafter, "_forward", slow)

    def lengths(*times_s):
        asked = [
            replace(query(40, CHAIN, k=8, session=number), answer_by=now[0] + seconds)
            for number, seconds in enumerate(times_s)
        ]
        return [max(len(row.draft_token_ids) for row in rows) for rows in drafter.propose(asked)]

    for _ in range(20):  # it learns what an extension takes
        assert lengths(math.inf) == [8]
    for seconds, expected in ((0.5, 1), (2.5, 1), (3.5, 2), (5.5, 4), (100.0, 8)):
        assert lengths(seconds) == [expected]
    assert lengths(5.5, 100.0) == [4, 4], "nobody is late because of another one"
    assert lengths(0.5, 100.0) == [8, 8], "who is late anyway hurries nobody"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, FILTERED])
def test_a_draft_vocabulary_is_all_it_chooses_from(sampling):
    vocabulary = torch.tensor([0, 3, 5, 6, 11, 12, 20, 33, 40, 41, 57, 66, 90])  # 7 is not in it
    loaded = loaded_model()
    loaded.model.lm_head = DraftHead(loaded.model.lm_head.get_parameter("weight"), vocabulary)
    asked = query(40, CHAIN, sampling, fanout=3)
    got = as_table(drafter_of(loaded=loaded, num_pages=8).propose([asked])[0])
    assert got == Target(vocabulary).expected_rows(asked)
    used = {token for key, draft in got.items() for token in (key[1], *draft)}
    assert used <= set(vocabulary.tolist())


def test_a_batch_of_unlike_queries_is_answered_as_if_alone(target):
    drafter = drafter_of(num_pages=16, prefill_chunk_tokens=64)
    asked = [
        query(40, BRANCHY, SAMPLED, session=1),
        query(200, CHAIN, GREEDY, session=2, k=1, fanout=3, shift=7),
        query(3, EMPTY, FILTERED, session=3, k=5, shift=50),
        query(70, CHAIN, SAMPLED, session=4, k=0, shift=90),
    ]
    answers = drafter.propose(asked)
    assert [as_table(rows) for rows in answers] == [target.expected_rows(one) for one in asked]


def test_rounds_build_on_the_cache_and_survive_rewritten_text(target):
    drafter = drafter_of(num_pages=8)
    for length in (40, 41, 45, 45, 130):
        asked = query(length, CHAIN)
        assert as_table(drafter.propose([asked])[0]) == target.expected_rows(asked)
    shorter = query(20, CHAIN)
    assert as_table(drafter.propose([shorter])[0]) == target.expected_rows(shorter)
    other = query(60, CHAIN, shift=9)
    assert as_table(drafter.propose([other])[0]) == target.expected_rows(other)


def test_an_evicted_session_is_read_again(target):
    drafter = drafter_of(num_pages=4)
    asked = {session: query(100, CHAIN, session=session, shift=session) for session in (1, 2, 3)}
    expected = {session: target.expected_rows(one) for session, one in asked.items()}
    for session in (1, 2, 3, 1, 3, 2):  # two sessions fit
        assert as_table(drafter.propose([asked[session]])[0]) == expected[session]


def test_more_queries_than_the_pool_holds_are_answered_in_turns(target):
    for limits in ({"num_pages": 4}, {"max_sessions": 1}, {"num_scratch_pages": 1}):
        drafter = drafter_of(**{"num_pages": 16, **limits})
        asked = [query(100, CHAIN, session=session, shift=session) for session in range(5)]
        answers = drafter.propose(asked)
        assert [as_table(rows) for rows in answers] == [target.expected_rows(a) for a in asked]


def test_a_text_that_cannot_fit_gets_no_rows_and_harms_nobody(target):
    drafter = drafter_of(num_pages=2)
    fine = query(50, CHAIN, session=2)
    answers = drafter.propose([query(129, session=1), fine, query(0, session=3)])
    assert answers[0] == answers[2] == []
    assert as_table(answers[1]) == target.expected_rows(fine)


def test_tokens_outside_the_vocabulary_get_no_rows(target):
    drafter = drafter_of(num_pages=4)
    foreign = query(10, DraftTree.chain((97,), DraftOrigin.LOCAL), session=1)
    fine = query(10, CHAIN, session=2)
    answers = drafter.propose([foreign, fine])
    assert answers[0] == []
    assert as_table(answers[1]) == target.expected_rows(fine)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, FILTERED])
def test_a_model_that_gives_no_numbers_is_sure_of_nothing(sampling):
    loaded = loaded_model()
    loaded.model.norm.weight.fill_(math.nan)
    with pytest.raises(InvalidLogitsError):
        drafter_of(loaded, num_pages=4).propose([query(10, CHAIN, sampling)])


def test_bonus_tokens_give_way_before_draft_length(target):
    drafter = drafter_of(num_pages=4, num_scratch_pages=1)
    rows = drafter.propose([query(10, CHAIN, k=5, fanout=16)])[0]
    assert len(rows) == 4 * 3  # 3 + 4 * 3 * 5 = 63 rows of 64
    assert {len(row.draft_token_ids) for row in rows} == {5}
    rows = drafter.propose([query(10, CHAIN, k=32, fanout=2)])[0]
    assert [len(row.draft_token_ids) for row in rows] == [15] * 4


def test_likelier_outcomes_come_first(target):
    drafter = drafter_of(num_pages=4)
    asked = query(30, EMPTY, fanout=6)
    rows = drafter.propose([asked])[0]
    best = target.scores(asked.token_ids, GREEDY).topk(6).indices.tolist()
    assert [row.bonus_token_id for row in rows] == best
    # A draft of unlikely tokens: what follows the text itself is the likeliest outcome.
    unlikely = target.scores(asked.token_ids, GREEDY).argmin()
    doubtful = query(30, DraftTree.chain((int(unlikely),), DraftOrigin.LOCAL), fanout=1)
    rows = drafter.propose([doubtful])[0]
    assert [row.node for row in rows] == [-1, -1]


def test_a_closed_session_frees_its_pages():
    drafter = drafter_of(num_pages=2)
    for session in range(10):
        rows = drafter.propose([query(100, session=session)])[0]
        assert rows
        assert all(isinstance(row, OutcomeRow) for row in rows)
        drafter.close(session)
    drafter.close(999)

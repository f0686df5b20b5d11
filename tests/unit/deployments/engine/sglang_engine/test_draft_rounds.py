"""The scheduler's rounds: whatever is drafted, the text is the target's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from deployments.engine.sglang_engine.draft_rounds import DraftRounds, Running, likeliest_chain
from deployments.engine.sglang_engine.own_params import own_params
from deployments.engine.speculation.speculator import NoSpeculation, TakenDraft
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from tests.fakes_engine import make_request

VOCAB_SIZE = 50


def next_token(text):
    return (sum(text) * 7 + len(text)) % VOCAB_SIZE


@dataclass
class Scripted(NoSpeculation):
    """Drafts what a function of the text says."""

    draft: object
    opened: list = field(default_factory=list)
    closed: list = field(default_factory=list)
    announced: list = field(default_factory=list)
    results: list = field(default_factory=list)
    texts: dict = field(default_factory=dict)

    def open(self, session):
        self.opened.append(session)
        self.texts[session.session_id] = list(session.token_ids)

    def take(self, requests, load):
        del load
        for request in requests:
            assert list(request.token_ids) == self.texts[request.session_id]
        return [TakenDraft(tree=self.draft(request), table_hit=True) for request in requests]

    def verifying(self, rounds):
        self.announced.append([tree for _, tree in rounds])

    def verified(self, results):
        self.results += results
        for result in results:
            self.texts[result.session_id] += result.new_token_ids

    def close(self, session_id):
        self.closed.append(session_id)


def generate(rounds, prompts, num_tokens, k=3, speculation=True):
    """What a scheduler with a model of its own does."""
    outputs = {rid: [next_token(prompt)] for rid, prompt in prompts.items()}
    while open_rids := [rid for rid in prompts if len(outputs[rid]) < num_tokens]:
        batch = [
            Running(
                rid,
                own_params(make_request(request_id=rid, speculation=speculation)),
                prompts[rid],
                outputs[rid],
                min(k, num_tokens - len(outputs[rid]) - 1),
            )
            for rid in open_rids
        ]
        drafts = rounds.begin(batch)
        rounds.announce()
        choices = []
        for running, draft in zip(batch, drafts, strict=True):
            assert len(draft) <= running.max_draft_tokens
            text = [*running.prompt_ids, *running.output_ids]
            choices.append(
                [
                    next_token([*text, *(draft.token_ids[step] for step in draft.path_to(node))])
                    for node in range(-1, len(draft))
                ]
                + [0, 0]
            )
        for rid, one in zip(open_rids, rounds.end(choices), strict=True):
            outputs[rid] += one.token_ids
            if len(outputs[rid]) >= num_tokens:
                rounds.leave(rid)
    return outputs


def right(request):
    text = list(request.token_ids)
    for _ in range(3):
        text.append(next_token(text))
    return DraftTree.chain(text[-3:], DraftOrigin.POOL)


def half_right(request):
    first, *_ = right(request).token_ids
    other = (first + 1) % VOCAB_SIZE
    return DraftTree((other, first, other), (-1, -1, 1), (DraftOrigin.LOCAL,) * 3)


def hidden(request):
    """The right ones, none of them on the likeliest chain."""
    first, second, third = right(request).token_ids
    others = [(token + 1) % VOCAB_SIZE for token in (first, second)]
    tree = DraftTree(
        (others[0], first, others[1], second, third),
        (-1, -1, 1, 1, 3),
        (DraftOrigin.LOCAL,) * 5,
    )
    return tree.cut(request.max_draft_tokens + 2)


def wrong(request):
    first, *_ = right(request).token_ids
    return DraftTree.chain([(first + 1) % VOCAB_SIZE] * 3, DraftOrigin.POOL)


def outside(request):
    del request
    return DraftTree.chain([VOCAB_SIZE + 3], DraftOrigin.POOL)


PROMPTS = {"a": [1, 2, 3], "b": [4], "c": [5, 6]}
PLAIN = generate(DraftRounds(NoSpeculation(), VOCAB_SIZE), PROMPTS, 20)


@pytest.mark.parametrize("takes_trees", [False, True])
@pytest.mark.parametrize("draft", [right, half_right, hidden, wrong, outside])
def test_the_text_does_not_depend_on_drafts(draft, takes_trees):
    speculator = Scripted(draft)
    rounds = DraftRounds(speculator, VOCAB_SIZE, takes_trees=takes_trees)
    assert generate(rounds, PROMPTS, 20) == PLAIN
    assert len(speculator.opened) == 3
    assert sorted(speculator.closed) == [session.session_id for session in speculator.opened]


def test_right_drafts_save_steps_and_are_counted():
    speculator = Scripted(right)
    generate(DraftRounds(speculator, VOCAB_SIZE), PROMPTS, 21)
    assert len(speculator.announced) == 5
    assert all(result.nodes == (0, 1, 2) for result in speculator.results)


def test_counts_tell_what_was_verified_and_whose_it_was():
    rounds = DraftRounds(Scripted(right), VOCAB_SIZE)
    running = Running("a", own_params(make_request()), [1, 2], [3], 2)
    (tree,) = rounds.begin([running])
    rounds.announce()
    first, text = tree.token_ids[0], [1, 2, 3]
    ((tokens, nodes, counts),) = rounds.end([[first, 49 - next_token([*text, first]), 0]])
    assert tokens == [first, 49 - next_token([*text, first])]
    assert nodes == (0,)
    assert counts == (2, 1, 1, 1, 0)


def test_branches_are_verified_where_they_can_be():
    speculator = Scripted(hidden)
    generate(DraftRounds(speculator, VOCAB_SIZE, takes_trees=True), PROMPTS, 20, k=5)
    full = [result for result in speculator.results if len(result.tree) == 5]
    assert full
    assert all(result.nodes == (1, 3, 4) for result in full)
    speculator = Scripted(hidden)
    generate(DraftRounds(speculator, VOCAB_SIZE), PROMPTS, 20, k=5)
    assert all(not result.nodes for result in speculator.results)


def test_whoever_wants_no_drafts_has_no_session():
    speculator = Scripted(right)
    rounds = DraftRounds(speculator, VOCAB_SIZE)
    assert generate(rounds, PROMPTS, 20, speculation=False) == PLAIN
    assert not speculator.opened
    assert rounds.begin([Running("warm up", None, [1], [2], 3)]) == [DraftTree()]


def test_a_text_that_grew_elsewhere_is_a_new_session():
    speculator = Scripted(right)
    rounds = DraftRounds(speculator, VOCAB_SIZE)
    own = own_params(make_request())
    rounds.begin([Running("a", own, [1], [2], 0)])
    rounds.end([[3]])
    rounds.begin([Running("a", own, [1], [2, 3, 4], 0)])
    assert [session.token_ids for session in speculator.opened] == [(1, 2), (1, 2, 3, 4)]
    assert speculator.closed == [1]
    rounds.begin([Running("b", own, [1], [2], 0)])
    assert speculator.closed == [1, 2]


def test_the_likeliest_chain_of_a_tree():
    tree = DraftTree((9, 8, 7, 6, 5), (-1, -1, 0, 1, 2), (DraftOrigin.POOL,) * 5)
    chain = likeliest_chain(tree)
    assert chain == DraftTree.chain((9, 7, 5), DraftOrigin.POOL)
    assert likeliest_chain(DraftTree()) == DraftTree()

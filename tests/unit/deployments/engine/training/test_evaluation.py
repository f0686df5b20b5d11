"""What an evaluation counts is what rounds of drafts, verified by the engine's rule, would give."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.speculation.acceptance import accept
from deployments.engine.speculation.types import DraftTree
from deployments.engine.training.evaluation import evaluate
from deployments.engine.training.tree_shape import TreeShape
from tests.eagle3_inference import drafted_one_by_one
from tests.unit.deployments.engine.training.test_student_model import (
    start,
    student_texts,
)
from tests.unit.deployments.engine.training.tiny_training import head, target, texts

SHAPES = [TreeShape((1, 1, 1)), TreeShape((2, 2, 1)), TreeShape((3,)), TreeShape((2, 3))]


def drafted_tree(draft, token_ids, shape):
    """The tree that a student drafts behind a text, every branch by itself."""
    embedding = target().model.embed_tokens.weight
    paths: list[tuple[int, ...]] = [()]
    nodes: list[int] = []
    for width in shape.widths:
        grown = []
        for path in paths:
            stream = draft(torch.tensor([[*token_ids, *path]]), embedding)
            likeliest = draft.logits(stream[0, -1]).topk(width).indices
            grown += [(*path, token) for token in draft.draft_token_ids[likeliest].tolist()]
        nodes += [path[-1] for path in grown]
        paths = grown
    return DraftTree(tuple(nodes), tuple(shape.parents()))


def choices(tree, continuation):
    """What the target chooses behind each node: the text's next token, if the node is in it."""
    chosen = [continuation[0]]
    for node in range(len(tree)):
        path = [tree.token_ids[at] for at in tree.path_to(node)]
        is_text = path == list(continuation[: len(path)]) and len(path) < len(continuation)
        chosen.append(continuation[len(path)] if is_text else -1)
    return chosen


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_commits_what_the_engine_would_accept_of_it(shape):
    draft, _ = start()
    num_rounds = num_committed = 0
    for text in student_texts()[:4]:
        token_ids = text.token_ids.tolist()
        first = int(text.is_answer.nonzero()[0])
        # The last row of an answer has nothing behind it that could be drafted.
        at, last = first, int(text.is_answer.nonzero()[-1])
        while at < last:
            tree = drafted_tree(draft, token_ids[: at + 2], shape)
            accepted = accept(tree, choices(tree, [*token_ids[at + 2 :], -2]))
            num_rounds += 1
            num_committed += len(accepted.nodes) + 1
            at += len(accepted.nodes) + 1
    embedding = target().model.embed_tokens.weight
    quality = evaluate(draft, embedding, student_texts()[:4], 3, shape)
    assert quality.tree_acceptance_length == pytest.approx(num_committed / num_rounds)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_tree_without_branches_is_a_chain(length):
    draft, _ = start()
    embedding = target().model.embed_tokens.weight
    quality = evaluate(draft, embedding, student_texts(), 4, TreeShape.chain(length))
    assert quality.tree_acceptance_length == quality.mean_acceptance_length[length - 1]


@torch.no_grad()
def test_a_head_s_second_guess_is_among_those_of_inference():
    a_head, embedding = head(), target().model.embed_tokens.weight
    text = texts()[0]
    rows = text.is_answer.nonzero().flatten().tolist()[:-1]
    is_right = []
    for at in rows:
        (logits,) = drafted_one_by_one(a_head, embedding, text, at, 1)
        guesses = a_head.draft_token_ids[logits.topk(5).indices].tolist()
        is_right.append(int(text.wanted[at + 1]) in guesses)
    assert any(is_right)
    committed = []
    while sum(committed) < len(rows):
        # Behind a right guess the next round begins a row later.
        committed.append(1 + is_right[sum(committed)])
    quality = evaluate(a_head, embedding, [text], 1, TreeShape((5,)))
    assert quality.tree_acceptance_length == pytest.approx(sum(committed) / len(committed))


def test_the_shape_of_a_tree():
    shape = TreeShape((2, 2, 1))
    assert shape.nodes_at == (2, 4, 4)
    assert shape.num_nodes == 10
    assert shape.extended_at == (1, 2, 4)
    assert shape.parents() == [-1, -1, 0, 0, 1, 1, 2, 3, 4, 5]
    assert shape.describe() == "10 nodes, 2-4-4 by depth"
    assert DraftTree((0,) * 3, tuple(TreeShape.chain(3).parents())).is_chain

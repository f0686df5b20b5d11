import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.acceptance import accept
from deployments.engine.speculation.types import DraftOrigin, DraftTree


def chain(*tokens: int) -> DraftTree:
    return DraftTree.chain(tokens, DraftOrigin.LOCAL)


@pytest.mark.parametrize(
    ("choices", "nodes", "bonus"),
    [
        ([9, 2, 3, 4], (), 9),
        ([1, 9, 3, 4], (0,), 9),
        ([1, 2, 9, 4], (0, 1), 9),
        ([1, 2, 3, 9], (0, 1, 2), 9),
    ],
)
def test_chain(choices, nodes, bonus):
    assert accept(chain(1, 2, 3), choices) == (nodes, bonus)


def test_without_a_draft_the_choice_is_the_bonus():
    assert accept(DraftTree(), [5]) == ((), 5)


def test_tree_follows_the_branch_the_target_took():
    #        root -> 1 -> 3
    #             -> 2 -> 3 -> 4
    tree = DraftTree((1, 2, 3, 3, 4), (-1, -1, 0, 1, 3))
    assert accept(tree, [2, 0, 3, 0, 4, 7]) == ((1, 3, 4), 7)
    assert accept(tree, [1, 3, 0, 8, 0, 0]) == ((0, 2), 8)
    assert accept(tree, [1, 4, 0, 0, 0, 0]) == ((0,), 4)
    assert accept(tree, [3, 0, 0, 0, 0, 0]) == ((), 3)


@given(st.data())
def test_text_is_what_plain_decoding_writes(data):
    num_tokens = 3
    parents = []
    taken: set[tuple[int, int]] = set()
    tokens = []
    for node in range(data.draw(st.integers(0, 8))):
        parent = data.draw(st.integers(-1, node - 1))
        free = [token for token in range(num_tokens) if (parent, token) not in taken]
        if not free:
            break
        token = data.draw(st.sampled_from(free))
        taken.add((parent, token))
        parents.append(parent)
        tokens.append(token)
    tree = DraftTree(tuple(tokens), tuple(parents))
    table = {
        path: data.draw(st.integers(0, num_tokens - 1), label=str(path))
        for path in {
            tuple(tree.token_ids[at] for at in tree.path_to(node)) for node in range(-1, len(tree))
        }
    }
    choices = [
        table[tuple(tree.token_ids[at] for at in tree.path_to(node))]
        for node in range(-1, len(tree))
    ]
    outcome = accept(tree, choices)
    text = [*(tree.token_ids[node] for node in outcome.nodes), outcome.bonus_token_id]
    for length, token in enumerate(text):
        assert table[tuple(text[:length])] == token
    assert tuple(text) not in table
    assert all(tree.parents[b] == a for a, b in itertools.pairwise((-1, *outcome.nodes)))

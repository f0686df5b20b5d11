"""Rows of a verification, against a reference that follows every path by itself."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.sglang_engine.verify_rows import moves, verify_rows
from deployments.engine.speculation.types import DraftOrigin, DraftTree

MAX_NODES = 9


@st.composite
def trees(draw):
    parents = tuple(
        draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, MAX_NODES)))
    )
    return DraftTree(tuple(range(100, 100 + len(parents))), parents)


def paths_of(tree):
    """Rows on the way to every row, itself included."""
    return [
        {0} | {1 + step for step in tree.path_to(row - 1)} if row else {0}
        for row in range(1 + len(tree))
    ]


@given(st.lists(trees(), min_size=1, max_size=4), st.integers(0, 3))
def test_every_row_sees_its_ancestors_alone_and_stands_where_they_end(batch, padding):
    width = 1 + max(map(len, batch)) + padding
    rows = verify_rows(list(range(len(batch))), batch, width)
    assert rows.tokens.shape == rows.depths.shape == (len(batch), width)
    for index, tree in enumerate(batch):
        used = 1 + len(tree)
        assert rows.tokens[index].tolist() == [
            index,
            *tree.token_ids,
            *[index] * (width - used),
        ]
        for row, seen in enumerate(paths_of(tree)):
            assert set(rows.sees[index, row].nonzero().flatten().tolist()) == seen
            assert rows.depths[index, row] == len(seen) - 1
        # What is behind the tree sees something, disturbs nobody, and stands within the model.
        assert not rows.sees[index, :used, used:].any()
        for row in range(used, width):
            assert set(rows.sees[index, row].nonzero().flatten().tolist()) == {0, row}
            assert 0 < rows.depths[index, row] < width


@given(st.lists(trees(), min_size=1, max_size=4))
def test_links_lead_through_every_node_once_and_through_no_padding(batch):
    width = 2 + max(map(len, batch))
    rows = verify_rows([7] * len(batch), batch, width)
    for index, tree in enumerate(batch):
        found = []

        def walk(row, parent, index=index, found=found):
            while row != -1:
                found.append((row - 1, parent))
                walk(int(rows.first_child[index, row]), row - 1)
                row = int(rows.next_sibling[index, row])

        assert int(rows.next_sibling[index, 0]) == -1
        walk(int(rows.first_child[index, 0]), -1)
        assert sorted(found) == list(enumerate(tree.parents))


def test_a_chain_is_a_triangle():
    chain = DraftTree.chain((5, 6, 7), DraftOrigin.POOL)
    rows = verify_rows([4], [chain], 4)
    assert torch.equal(rows.sees[0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert rows.depths.tolist() == [[0, 1, 2, 3]]
    assert rows.first_child.tolist() == [[1, 2, 3, -1]]
    assert rows.next_sibling.tolist() == [[-1, -1, -1, -1]]


@given(st.lists(trees(), min_size=1, max_size=4), st.data())
def test_moved_rows_leave_each_accepted_path_behind_its_text(batch, data):
    width = 1 + max(map(len, batch))
    accepted = [tree.path_to(data.draw(st.integers(-1, len(tree) - 1))) for tree in batch]
    sources, destinations = moves(accepted, width)
    before = torch.arange(len(batch) * width)
    at_once, in_order = before.clone(), before.clone()
    at_once[destinations] = before[sources]
    for source, destination in zip(sources, destinations, strict=True):
        in_order[destination] = in_order[source].item()
    assert torch.equal(at_once, in_order)
    for index, nodes in enumerate(accepted):
        start = index * width
        kept = at_once[start : start + 1 + len(nodes)].tolist()
        assert kept == [start, *(start + 1 + node for node in nodes)]
    assert all(later > earlier for earlier, later in pairwise(destinations))


def test_an_accepted_chain_stays_where_it_is():
    assert moves([(0, 1, 2), ()], 4) == ([], [])

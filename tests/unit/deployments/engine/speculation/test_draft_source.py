from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.draft_source import (
    NOTHING,
    POOL,
    DraftSource,
    Guess,
    Prior,
    Trust,
)
from deployments.engine.speculation.types import DraftOrigin, DraftTree, OutcomeRow

COPY = DraftSource(DraftOrigin.LOCAL, 2)


def trusting(pool: float, copy: float) -> Trust:
    chances = {POOL: pool, COPY: copy}
    places = [(source, depth) for source in chances for depth in range(4)]
    return Trust({place: Prior(chances[place[0]], 100) for place in places})


def first(trust: Trust, source: DraftSource) -> float:
    return trust.chances(source, 1)[0]


def test_the_likeliest_tokens_of_both_become_one_tree():
    guesses = [Guess((5, 6, 7), POOL), Guess((1, 2, 3), COPY)]
    merged = trusting(0.6, 0.5).merge(guesses, 4)
    assert merged.tree.token_ids == (5, 1, 6, 2)
    assert merged.tree.parents == (-1, -1, 0, 1)
    assert merged.chances == (0.6, 0.5, 0.36, 0.25)
    pool, local = DraftOrigin.POOL, DraftOrigin.LOCAL
    assert merged.tree.origins == (pool, local, pool, local)


def test_what_both_say_stands_once_and_is_the_first_ones():
    guesses = [Guess((5, 6), POOL), Guess((5, 6, 7), COPY)]
    merged = trusting(0.5, 0.9).merge(guesses, 8)
    assert merged.tree.token_ids == (5, 6, 7)
    assert merged.tree.is_chain
    assert merged.tree.origins == (DraftOrigin.POOL, DraftOrigin.POOL, DraftOrigin.LOCAL)
    assert merged.chances[0] == 0.9


def test_nothing_at_hand_is_nothing():
    assert trusting(0.5, 0.5).merge([], 4) == NOTHING
    assert trusting(0.5, 0.5).merge([Guess((1,), POOL)], 0) == NOTHING


def test_each_source_learns_of_its_own_tokens_only():
    trust = trusting(0.5, 0.5)
    guesses = [Guess((5, 6), POOL), Guess((1, 2), COPY)]
    tree = trust.merge(guesses, 4).tree
    for guess in guesses:
        trust.learn(guess, tree, tree.walk((1, 2)))
    assert first(trust, POOL) < 0.5 < first(trust, COPY)
    # What was not verified teaches nothing.
    before = first(trust, POOL)
    trust.learn(Guess((8,), POOL), tree, ())
    assert first(trust, POOL) == before


def test_places_of_a_guess_are_told_apart():
    trust = trusting(0.5, 0.5)
    for turn in range(100):
        tree = trust.merge([Guess((5, 6), POOL)], 2).tree
        trust.learn(Guess((5, 6), POOL), tree, (0, 1) if turn % 3 == 0 else ())
    one, two = trust.chances(POOL, 2)
    assert 0.2 < one < 0.5
    assert two > 0.8 * one  # right once, right again


def test_wrong_guesses_are_tried_one_token_at_a_time_and_grow_again():
    trust, lengths = Trust({}), []
    for _ in range(60):
        tree = trust.merge([Guess((5, 6, 7, 8), POOL)], 4).tree
        lengths.append(len(tree))
        trust.learn(Guess((5, 6, 7, 8), POOL), tree, ())
    assert lengths[0] == 4
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    for _ in range(20):
        tree = trust.merge([Guess((5, 6, 7, 8), POOL)], 4).tree
        trust.learn(Guess((5, 6, 7, 8), POOL), tree, range(len(tree)))
    assert trust.worth(POOL, 4) == 4


def test_a_new_sequence_starts_from_what_the_last_ones_did():
    priors = {}
    trust = Trust(priors)
    tree = trust.merge([Guess((5,), POOL)], 1).tree
    for _ in range(200):
        trust.learn(Guess((5,), POOL), tree, ())
    assert first(Trust(priors), POOL) < 0.1


def test_a_copy_is_known_by_the_doublings_of_what_it_rests_on():
    evidences = [
        DraftSource.of_copy(OutcomeRow(-1, 1, (), matched), 0).evidence
        for matched in (0, 1, 2, 3, 4, 8, 32)
    ]
    assert evidences == [0, 1, 2, 2, 3, 4, 4]


chains = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@given(
    st.lists(st.tuples(chains, st.sampled_from((POOL, COPY))), max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_any_guesses_make_a_sound_tree(told, pool, copy, most):
    guesses = [Guess(tokens, source) for tokens, source in told]
    merged = trusting(pool, copy).merge(guesses, most)
    tree = merged.tree
    assert len(tree) <= most
    assert len(tree.token_ids) == len(tree.parents) == len(tree.origins) == len(merged.chances)
    assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
    assert list(merged.chances) == sorted(merged.chances, reverse=True)
    children = list(zip(tree.parents, tree.token_ids, strict=True))
    assert len(set(children)) == len(children)
    paths = {tuple(tree.token_ids[at] for at in tree.path_to(node)) for node in range(len(tree))}
    assert all(any(guess.token_ids[: len(path)] == path for guess in guesses) for path in paths)
    assert all(tree.cut(length).parents == tree.parents[:length] for length in range(len(tree)))
    for path in paths:
        assert [tree.token_ids[node] for node in tree.walk((*path, 9))] == list(path)
    assert DraftTree().walk((1, 2)) == ()

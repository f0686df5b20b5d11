from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.draft_source import (
    NOTHING,
    Guess,
    Place,
    Prior,
    Trust,
    places,
    seconded,
)
from deployments.engine.speculation.types import DraftOrigin, DraftTree

POOL, COPY = DraftOrigin.POOL, DraftOrigin.LOCAL


def trusting(pool: float, copy: float) -> Trust:
    chances = {POOL: pool, COPY: copy}
    known = [place for origin in chances for place in places(origin, 4)]
    return Trust({place: Prior(chances[place.origin], 100) for place in known})


def first(trust: Trust, origin: DraftOrigin) -> float:
    return trust.chances(places(origin, 1))[0]


def guess(token_ids: tuple[int, ...], origin: DraftOrigin) -> Guess:
    return Guess.of(origin, token_ids)


def test_the_likeliest_tokens_of_both_become_one_tree():
    guesses = [guess((5, 6, 7), POOL), guess((1, 2, 3), COPY)]
    merged = trusting(0.6, 0.5).merge(guesses, 4)
    assert merged.tree.token_ids == (5, 1, 6, 2)
    assert merged.tree.parents == (-1, -1, 0, 1)
    assert merged.chances == (0.6, 0.5, 0.36, 0.25)
    pool, local = DraftOrigin.POOL, DraftOrigin.LOCAL
    assert merged.tree.origins == (pool, local, pool, local)


def test_what_both_say_stands_once_and_is_the_first_ones():
    guesses = [guess((5, 6), POOL), guess((5, 6, 7), COPY)]
    merged = trusting(0.5, 0.9).merge(guesses, 8)
    assert merged.tree.token_ids == (5, 6, 7)
    assert merged.tree.is_chain
    assert merged.tree.origins == (DraftOrigin.POOL, DraftOrigin.POOL, DraftOrigin.LOCAL)
    assert merged.chances[0] == 0.9


def test_nothing_at_hand_is_nothing():
    assert trusting(0.5, 0.5).merge([], 4) == NOTHING
    assert trusting(0.5, 0.5).merge([guess((1,), POOL)], 0) == NOTHING


def test_each_source_learns_of_its_own_tokens_only():
    trust = trusting(0.5, 0.5)
    guesses = [guess((5, 6), POOL), guess((1, 2), COPY)]
    tree = trust.merge(guesses, 4).tree
    for each in guesses:
        trust.learn(each, tree, tree.walk((1, 2)))
    assert first(trust, POOL) < 0.5 < first(trust, COPY)
    # What was not verified teaches nothing.
    before = first(trust, POOL)
    trust.learn(guess((8,), POOL), tree, ())
    assert first(trust, POOL) == before


def test_places_of_a_guess_are_told_apart():
    trust = trusting(0.5, 0.5)
    for turn in range(100):
        tree = trust.merge([guess((5, 6), POOL)], 2).tree
        trust.learn(guess((5, 6), POOL), tree, (0, 1) if turn % 3 == 0 else ())
    one, two = trust.chances(places(POOL, 2))
    assert 0.2 < one < 0.5
    assert two > 0.8 * one  # right once, right again


def test_wrong_guesses_are_tried_one_token_at_a_time_and_grow_again():
    trust, lengths = Trust({}), []
    for _ in range(60):
        tree = trust.merge([guess((5, 6, 7, 8), POOL)], 4).tree
        lengths.append(len(tree))
        trust.learn(guess((5, 6, 7, 8), POOL), tree, ())
    assert lengths[0] == 4
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    for _ in range(20):
        tree = trust.merge([guess((5, 6, 7, 8), POOL)], 4).tree
        trust.learn(guess((5, 6, 7, 8), POOL), tree, range(len(tree)))
    assert trust.worth(POOL, 4) == 4


def test_a_new_sequence_starts_from_what_the_last_ones_did():
    priors = {}
    trust = Trust(priors)
    tree = trust.merge([guess((5,), POOL)], 1).tree
    for _ in range(200):
        trust.learn(guess((5,), POOL), tree, ())
    assert first(Trust(priors), POOL) < 0.1


def test_a_drafters_own_estimate_is_believed_until_it_is_known_better():
    trust = Trust({})
    sure, unsure = (Guess.of(COPY, (5, 6), (chance, chance)) for chance in (0.95, 0.15))
    assert trust.chances(sure.places)[1] > 0.85
    assert trust.chances(unsure.places)[0] == pytest.approx(0.15)
    tree = trust.merge([sure], 2).tree
    for _ in range(100):
        trust.learn(sure, tree, ())
    assert trust.chances(sure.places)[0] < 0.1
    assert trust.chances(unsure.places)[0] == pytest.approx(0.15)


def test_estimates_of_the_first_tokens_are_enough():
    mixed = Guess.of(COPY, (5, 6, 7), (0.95,), rank=1)
    assert mixed.places == (Place(COPY, grade=10), *places(COPY, 3, rank=1)[1:])
    assert Guess.of(COPY, (5,), (0.95, 0.5)).places == (Place(COPY, grade=10),)


def test_what_two_drafters_say_is_a_kind_of_its_own():
    both = [guess((5, 6, 7), POOL), Guess.of(COPY, (5, 6, 9), (0.55,) * 3), guess((5, 6), COPY)]
    marks = [[place.is_seconded for place in each.places] for each in seconded(both)]
    assert marks == [[True, True, False], [True, True, False], [True, True]]
    assert seconded(both[1:]) == tuple(both[1:])  # one drafter twice is no second
    trust = Trust({})
    alone, agreed = both[1].places, seconded(both)[1].places
    assert trust.chances(agreed)[0] > trust.chances(alone)[0] == pytest.approx(0.55)
    tree = trust.merge(seconded(both), 8).tree
    for _ in range(50):
        for each in seconded(both):
            trust.learn(each, tree, ())
    assert trust.chances(agreed)[0] < 0.2
    assert trust.chances(alone)[0] == pytest.approx(0.55)


def test_without_trees_the_likeliest_chain_takes_all_rows():
    trust = Trust(trusting(0.6, 0.5)._priors, takes_trees=False)
    merged = trust.merge([guess((5, 6, 7), POOL), guess((1, 2, 3), COPY)], 3)
    assert merged.tree == DraftTree.chain((5, 6, 7), POOL)
    assert len(merged.chances) == 3


def test_a_row_that_is_hardly_ever_right_is_none():
    unlikely = Guess.of(COPY, (5, 6, 7), (0.15, 0.15, 0.9))
    assert trusting(0.5, 0.5).merge([unlikely], 4).tree.token_ids == (5,)


chains = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@given(
    st.lists(st.tuples(chains, st.sampled_from((POOL, COPY))), max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_any_guesses_make_a_sound_tree(told, pool, copy, most):
    guesses = [Guess.of(origin, tokens) for tokens, origin in told]
    merged = trusting(pool, copy).merge(guesses, most)
    tree = merged.tree
    assert len(tree) <= most
    assert len(tree.token_ids) == len(tree.parents) == len(tree.origins) == len(merged.chances)
    assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
    assert list(merged.chances) == sorted(merged.chances, reverse=True)
    children = list(zip(tree.parents, tree.token_ids, strict=True))
    assert len(set(children)) == len(children)
    paths = {tuple(tree.token_ids[at] for at in tree.path_to(node)) for node in range(len(tree))}
    assert all(any(each.token_ids[: len(path)] == path for each in guesses) for path in paths)
    assert all(tree.cut(length).parents == tree.parents[:length] for length in range(len(tree)))
    for path in paths:
        assert [tree.token_ids[node] for node in tree.walk((*path, 9))] == list(path)
    assert DraftTree().walk((1, 2)) == ()

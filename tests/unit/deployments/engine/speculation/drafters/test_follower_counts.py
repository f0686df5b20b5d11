from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.drafters.follower_counts import FollowerCounts, Followers

texts = st.lists(st.integers(0, 3), max_size=80)


class Next(NamedTuple):
    token_id: int
    chance: float


def counted(*parts: list[int], max_tokens: int = 10_000) -> FollowerCounts:
    counts = FollowerCounts(max_tokens)
    for part in parts:
        counts.begin()
        counts.extend(part)
    return counts


def likeliest(known, context, most):
    """Next tokens with their chances, of one text or of two."""
    (own, own_weight), *others = known
    followers = Followers(own, own_weight, others[0][0] if others else None)
    chains = followers.chains_behind(context, most=most, length=1)
    return [Next(*chain.token_ids, *chain.chances) for chain in chains]


@given(texts, texts)
def test_what_is_likely_did_follow(text, context):
    found = likeliest([(counted(text), 1.0)], context, 9)
    followed = {two for one, two in pairwise(text) if [one] == context[-1:]}
    assert {follower.token_id for follower in found} == followed
    assert sum(follower.chance for follower in found) < 1
    assert [each.chance for each in found] == sorted((each.chance for each in found), reverse=True)


def expected(known, context):
    """The same by the book: of each context all that followed it, from the longest down."""
    chances, weight = {}, 1.0
    for order in (5, 3, 2, 1):
        if order > len(context):
            continue
        counts = {}
        for text, its_weight in known:
            for at in range(order, len(text)):
                if text[at - order : at] == context[-order:]:
                    counts[text[at]] = counts.get(text[at], 0.0) + its_weight
        if not counts:
            continue
        escape = 2.0 * len(counts)
        total = sum(counts.values()) + escape
        for token, count in counts.items():
            chances[token] = chances.get(token, 0.0) + weight * count / total
        weight *= escape / total
        if weight < 0.03:
            break
    return chances


@given(texts, texts, texts)
def test_chances_are_those_of_the_formula(own, other, context):
    known = [(counted(own), 4.0), (counted(other), 1.0)]
    found = likeliest(known, context, 9)
    assert {each.token_id: each.chance for each in found} == pytest.approx(
        expected([(own, 4.0), (other, 1.0)], context)
    )


@given(texts, texts, st.sets(st.integers(0, 3)))
def test_each_token_of_a_chain_is_the_likeliest_behind_those_before(text, context, taken):
    followers = Followers(counted(text), 1.0)
    chains = followers.chains_behind(context, most=3, length=4, taken=taken)
    assert not taken & {chain.token_ids[0] for chain in chains}
    for chain in chains:
        for at in range(1, len(chain.token_ids)):
            behind = [*context, *chain.token_ids[:at]]
            best = followers.chains_behind(behind, most=1, length=1)[0]
            assert (chain.token_ids[at], chain.chances[at]) == (*best.token_ids, *best.chances)


def test_a_chain_ends_where_too_little_is_likely():
    followers = Followers(counted([1, 2, 3, 4, 5]), 1.0)
    whole = followers.chains_behind([1], most=1, length=4)[0]
    assert whole.token_ids == (2, 3, 4, 5)
    product = whole.chances[0] * whole.chances[1]
    cut = followers.chains_behind([1], most=1, length=4, least_chance=product * 1.01)[0]
    assert cut.token_ids == (2, 3)


@given(texts)
def test_of_one_context_the_most_frequent_is_the_likeliest(text):
    followed = Counter(two for one, two in pairwise(text) if one == 0)
    # Only the shortest context is known where the text before differs.
    found = likeliest([(counted(text), 1.0)], [0], 1)
    if followed:
        assert followed[found[0].token_id] == max(followed.values())
    else:
        assert found == []


def test_longer_contexts_say_more():
    text = [1, 2, 3, 9, 5, 2, 4, 9, 6, 2, 4, 9, 7, 2, 4]
    assert likeliest([(counted(text), 1.0)], [5, 2], 1)[0].token_id == 4
    assert likeliest([(counted(text), 1.0)], [1, 2], 1)[0].token_id == 3


def test_a_heavier_text_wins():
    light, heavy = counted([1, 2] * 3), counted([1, 3])
    assert likeliest([(heavy, 4.0), (light, 1.0)], [1], 1)[0].token_id == 3
    assert likeliest([(heavy, 1.0), (light, 1.0)], [1], 1)[0].token_id == 2


def test_nothing_follows_from_one_text_to_the_next():
    assert likeliest([(counted([1, 2], [3, 4]), 1.0)], [2], 1) == []


@pytest.mark.parametrize("length", [1, 50, 99, 100, 101, 1000])
def test_the_newest_half_at_least_is_remembered(length):
    counts = counted(list(range(length)), max_tokens=100)
    assert min(length, 50) <= len(counts) <= 100
    for token in range(max(0, length - 50), length - 1):
        assert likeliest([(counts, 1.0)], [token], 1)[0].token_id == token + 1
    if length > 200:
        assert likeliest([(counts, 1.0)], [length - 150], 1) == []


def test_few_followers_of_a_context_are_kept_and_all_are_counted():
    text = [token for other in range(300) for token in (1, 1000 + other, 1, 2)]
    found = likeliest([(counted(text), 1.0)], [1], 99)
    assert found[0].token_id == 2
    assert len(found) <= 8
    # Half of what followed was a 2, though most of the rest is forgotten.
    assert 0.4 < found[0].chance < 0.5

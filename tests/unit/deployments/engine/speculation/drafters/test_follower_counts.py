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

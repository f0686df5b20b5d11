from __future__ import annotations

from deployments.prefix_affinity import PrefixAffinity, prefix_hashes

PAGE = list(range(64))


def test_hashes_cover_everything_before_them() -> None:
    one = prefix_hashes("t", PAGE + PAGE + [1, 2])
    other = prefix_hashes("t", [9, *PAGE[1:], *PAGE])
    assert len(one) == 2
    assert one[:1] == prefix_hashes("t", PAGE)
    assert not set(one) & set(other)


def test_tenants_share_nothing() -> None:
    assert not set(prefix_hashes("a", PAGE)) & set(prefix_hashes("b", PAGE))


def test_a_short_prompt_has_no_prefix() -> None:
    assert prefix_hashes("t", PAGE[:63]) == []


def test_the_longest_known_prefix_wins() -> None:
    affinity = PrefixAffinity(100)
    short, long = prefix_hashes("t", PAGE), prefix_hashes("t", PAGE + PAGE)
    affinity.record(short, "a")
    affinity.record(long, "b")
    affinity.record(short, "a")
    assert affinity.lookup(long, {"a", "b"}) == "b"
    assert affinity.lookup(long, {"a"}) == "a"
    assert affinity.lookup(long, set()) is None
    assert affinity.lookup(prefix_hashes("u", PAGE), {"a", "b"}) is None


def test_the_least_recently_used_prefixes_are_forgotten() -> None:
    affinity = PrefixAffinity(2)
    prompts = [prefix_hashes("t", [n, *PAGE[1:]]) for n in range(3)]
    affinity.record(prompts[0], "a")
    affinity.record(prompts[1], "a")
    affinity.record(prompts[0], "a")
    affinity.record(prompts[2], "a")
    known = [affinity.lookup(prompt, {"a"}) for prompt in prompts]
    assert known == ["a", None, "a"]
    assert len(affinity) == 2

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.prefixes import HeldPrefixes, prefix_names, read_report, report
from deployments.prefix_affinity import PrefixAffinity

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = list(range(64))
SHORT, LONG = prefix_names("t", PAGE), prefix_names("t", PAGE + PAGE)


def silent(*replicas: str) -> dict[str, HeldPrefixes | None]:
    return dict.fromkeys(replicas)


def holding(names: Sequence[int], *, is_complete: bool = True) -> HeldPrefixes | None:
    return read_report(report(names, is_complete=is_complete))


def test_the_longest_known_prefix_wins() -> None:
    affinity = PrefixAffinity(100)
    affinity.record(SHORT, "a")
    affinity.record(LONG, "b")
    affinity.record(SHORT, "a")
    assert affinity.lookup(LONG, silent("a", "b")) == ("b",)
    assert affinity.lookup(LONG, silent("a")) == ("a",)
    assert affinity.lookup(LONG, {}) == ()
    assert affinity.lookup(prefix_names("u", PAGE), silent("a", "b")) == ()


def test_the_least_recently_used_prefixes_are_forgotten() -> None:
    affinity = PrefixAffinity(2)
    prompts = [prefix_names("t", [n, *PAGE[1:]]) for n in range(3)]
    affinity.record(prompts[0], "a")
    affinity.record(prompts[1], "a")
    affinity.record(prompts[0], "a")
    affinity.record(prompts[2], "a")
    known = [affinity.lookup(prompt, silent("a")) for prompt in prompts]
    assert known == [("a",), (), ("a",)]
    assert len(affinity) == 2


def test_a_reported_prefix_is_known_without_having_been_sent() -> None:
    affinity = PrefixAffinity(100)
    replicas = {"a": holding([]), "b": holding(SHORT), "c": None}
    assert affinity.lookup(LONG, replicas) == ("b",)
    assert affinity.lookup(LONG, replicas | {"a": holding(LONG)}) == ("a",)
    assert affinity.lookup(LONG, {"a": holding(LONG), "b": holding(LONG)}) == ("a", "b")


def test_the_replica_that_took_it_last_comes_first() -> None:
    affinity = PrefixAffinity(100)
    affinity.record(LONG, "b")
    assert affinity.lookup(LONG, {"a": holding(LONG), "b": holding(LONG)}) == ("b", "a")


def test_what_is_not_reported_in_time_has_been_given_up() -> None:
    now = [0.0]
    affinity = PrefixAffinity(100, unconfirmed_s=10.0, clock=lambda: now[0])
    affinity.record(LONG, "a")
    nothing = {"a": holding([]), "b": holding([])}
    now[0] = 9.0
    assert affinity.lookup(LONG, nothing) == ("a",)
    now[0] = 11.0
    assert affinity.lookup(LONG, nothing) == ()
    assert affinity.lookup(LONG, nothing | {"a": holding(SHORT)}) == ("a",)
    assert affinity.lookup(LONG, nothing | {"a": None}) == ("a",)
    assert affinity.lookup(LONG, nothing | {"a": holding([], is_complete=False)}) == ("a",)

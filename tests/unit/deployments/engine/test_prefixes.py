from __future__ import annotations

import json

from deployments.engine.prefixes import (
    MAX_PAGES,
    MAX_REPORTED,
    page_name,
    prefix_names,
    read_report,
    report,
    root_name,
)

PAGE = list(range(64))


def test_names_cover_everything_before_them() -> None:
    one = prefix_names("t", PAGE + PAGE + [1, 2])
    other = prefix_names("t", [9, *PAGE[1:], *PAGE])
    assert len(one) == 2
    assert one[:1] == prefix_names("t", PAGE)
    assert not set(one) & set(other)


def test_a_page_is_named_from_the_one_before_it() -> None:
    first, second = prefix_names("t", PAGE + PAGE)
    assert page_name(root_name("t"), PAGE) == first
    assert page_name(first, PAGE) == second


def test_tenants_share_nothing() -> None:
    assert not set(prefix_names("a", PAGE)) & set(prefix_names("b", PAGE))


def test_a_short_prompt_has_no_prefix_and_a_long_one_a_bounded_number() -> None:
    assert prefix_names("t", PAGE[:63]) == []
    assert len(prefix_names("t", PAGE * (MAX_PAGES + 3))) == MAX_PAGES


def test_a_report_says_what_is_held() -> None:
    names = prefix_names("t", PAGE * 3)
    held = read_report(report(names[:2], is_complete=True))
    assert held is not None
    assert held.is_complete
    assert [held.holds(name) for name in names] == [True, True, False]
    partial = read_report(report([], is_complete=False))
    assert partial is not None
    assert not partial.is_complete
    assert not partial.holds(names[0])


def test_who_reports_nothing_holds_nobody_knows_what() -> None:
    assert read_report({}) is None
    assert read_report({"prefixes": 3}) is None


def test_the_largest_report_is_as_large_as_is_said() -> None:
    names = range(1, (MAX_REPORTED + 1) * 999_983, 999_983)
    assert len(json.dumps(report(names[:MAX_REPORTED], is_complete=True))) < 45_000

"""From SGLang's KV events to the names of prefixes."""

from __future__ import annotations

from itertools import pairwise

from deployments.engine.prefixes import MAX_PAGES, MAX_REPORTED, prefix_names, read_report
from deployments.engine.sglang_engine.held_pages import HeldPages

TEXT = [token % 1000 for token in range(64 * 5)]
GPU, HOST = "GPU", "CPU_PINNED"


def stored(blocks, tokens, parent=None, medium=GPU, salt="s", size=64):
    return {
        "type": "BlockStored",
        "block_hashes": list(blocks),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": size,
        "lora_id": None,
        "medium": medium,
        "cache_salt": salt,
    }


def removed(*blocks, medium=GPU):
    return {"type": "BlockRemoved", "block_hashes": list(blocks), "medium": medium}


def of_tenant(**changes) -> HeldPages:
    held = HeldPages(**changes)
    held.owner("s", "t")
    return held


def which(held: HeldPages, tenant: str = "t", text=TEXT) -> list[bool]:
    """Of the text's pages: whether each is reported."""
    told = read_report(held.report())
    return [told.holds(name) for name in prefix_names(tenant, text)]


def is_complete(held: HeldPages) -> bool:
    return read_report(held.report()).is_complete


def test_pages_are_named_along_their_chain():
    held = of_tenant()
    held.apply([stored([11, 12], TEXT[:128])])
    held.apply([stored([13], TEXT[128:192], parent=12)])
    assert which(held) == [True, True, True, False, False]
    assert which(held, "other") == [False] * 5
    assert is_complete(held)


def test_a_page_is_held_until_it_is_removed_from_everywhere():
    held = of_tenant()
    held.apply([stored([11], TEXT[:64]), stored([11], TEXT[:64], medium=HOST)])
    held.apply([removed(11, medium=GPU)])
    assert which(held)[0]
    held.apply([removed(11, 99, medium=HOST)])
    assert not which(held)[0]
    assert len(held) == 0


def test_emptied_memory_holds_nothing():
    held = of_tenant()
    held.apply([stored([11, 12], TEXT[:128]), {"type": "AllBlocksCleared"}])
    assert which(held) == [False] * 5
    assert is_complete(held)


def test_pairs_of_tokens_are_taken_by_their_first():
    held = of_tenant()
    held.apply([stored([11], [*pairwise(TEXT[:65])])])
    assert which(held)[0]


def test_what_cannot_be_named_is_left_out():
    held = of_tenant()
    held.apply([stored([1], TEXT[:64], salt="unknown"), stored([2], TEXT[:64], salt=None)])
    held.apply([stored([3], TEXT[64:128], parent=77)])
    held.apply([stored([4], TEXT[:16], size=16)])
    held.apply([{"type": "SomethingNew"}])
    assert len(held) == 0
    assert is_complete(held)


def test_pages_deeper_than_names_go_are_left_out():
    held = of_tenant()
    text = [n % 7 for n in range(64 * (MAX_PAGES + 2))]
    held.apply([stored(range(MAX_PAGES + 2), text)])
    assert which(held, text=text) == [True] * MAX_PAGES
    assert is_complete(held)


def test_lost_events_leave_nothing_certain_until_all_is_cleared():
    held = of_tenant()
    held.apply([stored([11], TEXT[:64])])
    held.lost()
    assert which(held) == [False] * 5
    assert not is_complete(held)
    held.apply([stored([12], TEXT[64:128], parent=11), stored([11], TEXT[:64])])
    assert which(held)[:2] == [True, False]
    assert not is_complete(held)
    held.apply([{"type": "AllBlocksCleared"}])
    assert is_complete(held)


def test_more_than_is_remembered_is_said_not_to_be_all():
    held = of_tenant(max_held=3)
    held.apply([stored([11, 12, 13, 14], TEXT[:256])])
    assert which(held) == [False, True, True, True, False]
    assert not is_complete(held)


def test_a_report_is_bounded():
    held = of_tenant()
    for number in range(MAX_REPORTED + 1):
        held.apply([stored([number], [number, *TEXT[1:64]])])
    told = read_report(held.report())
    assert MAX_REPORTED - 5 < len(told.short_names) <= MAX_REPORTED
    assert not told.is_complete

"""Names of prompt prefixes, by which routers and replicas speak of the pages that replicas hold.

A name covers one full page and everything before it:

    name(page) = xxh3-64(name before it, 8 bytes little-endian || its tokens, 4 bytes each)

and the name before the first page is xxh3-64 of the tenant. So a replica that hears of a page and
of the one before it can name it without the rest of the text. Names decide where a request goes
and nothing else: two that collide cost speed.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PAGE_TOKENS = 64
MAX_PAGES = 64
"""Of a prompt that have names; what comes behind them does not decide where it goes."""
MAX_REPORTED = 8192
"""Names in one report: 43 KB of text, which Serve's controller hands to every router."""

Report: TypeAlias = "dict[str, str | bool]"
"""What travels from a replica to the routers."""

_NAMES, _IS_COMPLETE = "prefixes", "is_complete"
_SHORT = 0xFFFFFFFF


def root_name(tenant: str) -> int:
    """The name before a tenant's first pages."""
    return xxhash.xxh3_64_intdigest(tenant.encode())


def page_name(before: int, token_ids: Sequence[int]) -> int:
    """The name of a full page.

    Args:
        before: name of the page before it, or ``root_name``.
        token_ids: ``PAGE_TOKENS`` of them.
    """
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    return xxhash.xxh3_64_intdigest(before.to_bytes(8, "little") + tokens)


def prefix_names(tenant: str, token_ids: Sequence[int]) -> list[int]:
    """One name per full page of a prompt, the first ``MAX_PAGES`` at most."""
    num_pages = min(len(token_ids) // PAGE_TOKENS, MAX_PAGES)
    names: list[int] = []
    name = root_name(tenant)
    for page in range(num_pages):
        name = page_name(name, token_ids[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
        names.append(name)
    return names


class HeldPrefixes(NamedTuple):
    """What a replica says it holds.

    Attributes:
        short_names: lower 32 bits of the names.
        is_complete: whether what is not among them is not held.
    """

    short_names: frozenset[int]
    is_complete: bool

    def holds(self, name: int) -> bool:
        """Whether a page is among them; wrong once in some 100,000 questions."""
        return name & _SHORT in self.short_names


def report(names: Iterable[int], *, is_complete: bool) -> Report:
    """Pages as a replica reports them.

    Args:
        names: ``MAX_REPORTED`` at most; their order does not matter.
        is_complete: see ``HeldPrefixes``.
    """
    short = np.array(sorted({name & _SHORT for name in names}), dtype="<u4")
    return {_NAMES: base64.b64encode(short.tobytes()).decode(), _IS_COMPLETE: is_complete}


def read_report(told: Mapping[str, object]) -> HeldPrefixes | None:
    """The other way; None from a replica that reports nothing."""
    names, is_complete = told.get(_NAMES), told.get(_IS_COMPLETE)
    if not isinstance(names, str):
        return None
    short = np.frombuffer(base64.b64decode(names), dtype="<u4")
    return HeldPrefixes(frozenset(short.tolist()), is_complete is True)

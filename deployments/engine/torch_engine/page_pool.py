"""Who owns which KV page: reference counts, the prefix cache's index, and what is evicted.

A page is in exactly one of four states: *free* (nobody owns it, nothing worth keeping), *owned*
(one or more sequences hold it), *idle* (nobody owns it, but it is indexed by its key and can be
revived until somebody needs the room), or *lent* (the KV tier may write to it until somebody needs
the room). A page is indexed only when all its rows belong to committed tokens; from then on it is
never written again, so any number of sequences may share it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kv_store.keys import PageKey
    from kv_store.landing import Landing


@dataclass(slots=True, eq=False)
class Loan:
    """A lent page.

    Attributes:
        landing: through which the page is written; None where no other thread writes to it.
        is_over: the page was taken back, or kept.
    """

    page: int
    landing: Landing | None
    is_over: bool = False

    def end(self) -> None:
        """From here on nobody else writes to the page."""
        self.is_over = True
        if self.landing is not None:
            self.landing.withdraw()


class PagePool:
    """Page numbers and their owners; the rows themselves live in the KV cache."""

    def __init__(self, num_pages: int, on_allocate: Callable[[int], None] | None = None) -> None:
        """Start with all pages free.

        Args:
            num_pages: of the KV cache.
            on_allocate: called with each page that is handed out, whose rows are garbage from then.
        """
        self.num_pages = num_pages
        self._on_allocate = on_allocate
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages
        self._key_of: dict[int, PageKey] = {}
        self._page_of: dict[PageKey, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._loans: OrderedDict[int, Loan] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could still hand out, idle and lent ones included."""
        return len(self._free) + len(self._idle) + len(self._loans)

    @property
    def num_lent(self) -> int:
        """Of these, the lent ones."""
        return len(self._loans)

    def allocate(self) -> int | None:
        """Take one page, evicting the least recently used idle one if need be, or the latest lent.

        Returns:
            A page owned once, holding garbage; None if every page is owned.
        """
        page = self._take_unused()
        if page is None and self._loans:
            page, loan = self._loans.popitem()
            loan.end()
        if page is None:
            return None
        self._num_owners[page] = 1
        if self._on_allocate is not None:
            self._on_allocate(page)
        return page

    def lend(self, count: int, landing_of: Callable[[int], Landing | None]) -> list[Loan]:
        """Lend pages that nobody owns; they hold garbage until ``keep``.

        Args:
            count: fewer are lent where all others are owned or lent.
            landing_of: the way to write to a page.
        """
        loans: list[Loan] = []
        while len(loans) < count and (page := self._take_unused()) is not None:
            loan = self._loans[page] = Loan(page, landing_of(page))
            loans.append(loan)
        return loans

    def keep(self, loan: Loan) -> bool:
        """End a loan and own the page once; False if it was taken back before."""
        if loan.is_over:
            return False
        loan.end()
        del self._loans[loan.page]
        self._num_owners[loan.page] = 1
        if self._on_allocate is not None:
            self._on_allocate(loan.page)
        return True

    def _take_unused(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def acquire_prefix(self, keys: Sequence[PageKey]) -> list[int]:
        """Become an owner of the pages of the longest indexed prefix of a chain."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._num_owners[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def touch_prefix(self, keys: Sequence[PageKey]) -> int:
        """Mark the longest indexed prefix of a chain as just used, and return its length."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        # The tail first: what lies deeper in a chain is worthless without its ancestors.
        for page in reversed(pages):
            if page in self._idle:
                self._idle.move_to_end(page)
        return len(pages)

    def count_prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of the longest indexed prefix of a chain.

        Changes nothing, and each look is one look into a dict: a hint to any thread.
        """
        return next((at for at, key in enumerate(keys) if key not in self._page_of), len(keys))

    def publish(self, page: int, key: PageKey) -> bool:
        """Index an owned page whose rows are all committed.

        Returns:
            False if another page already answers to this key; the pool then keeps that one.
        """
        if key in self._page_of:
            return False
        self._page_of[key] = page
        self._key_of[page] = key
        return True

    def release(self, pages: Sequence[int]) -> None:
        """Give up one ownership of each page of a page table, given in chain order."""
        for page in reversed(pages):
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def check_integrity(self, page_tables: Iterable[Sequence[int]]) -> None:
        """Compare the pool's books with the page tables of every live sequence.

        Raises:
            RuntimeError: a page is leaked, owned twice by mistake, or in two states at once.
        """
        owners = Counter(page for table in page_tables for page in table)
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a page is twice in the free list")
        for page, num_owners in enumerate(self._num_owners):
            if owners[page] != num_owners:
                raise RuntimeError(f"page {page} has {owners[page]} owners, counted {num_owners}")
            is_lent = page in self._loans
            if (page in free) + (page in self._idle) + is_lent + (num_owners > 0) != 1:
                raise RuntimeError(f"page {page} is not in exactly one state")
            if page in self._idle and page not in self._key_of:
                raise RuntimeError(f"idle page {page} has no key")
        if {key: page for page, key in self._key_of.items()} != self._page_of:
            raise RuntimeError("the index and its inverse differ")

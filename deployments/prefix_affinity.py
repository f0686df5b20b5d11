"""Which replica has seen the beginning of a prompt: a bounded map, no Ray."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_PAGE_TOKENS = 64
_MAX_PAGES = 64


def prefix_hashes(tenant: str, token_ids: Sequence[int]) -> list[int]:
    """One 64-bit hash per full page of a prompt, each covering everything before it."""
    num_pages = min(len(token_ids) // _PAGE_TOKENS, _MAX_PAGES)
    tokens = np.asarray(token_ids[: num_pages * _PAGE_TOKENS], dtype="<u4")
    digest = xxhash.xxh3_64(tenant.encode())
    hashes: list[int] = []
    for page in range(num_pages):
        digest.update(tokens[page * _PAGE_TOKENS : (page + 1) * _PAGE_TOKENS].tobytes())
        hashes.append(digest.intdigest())
    return hashes


class PrefixAffinity:
    """Remembers the replica that last took each prompt prefix; the least used are forgotten."""

    def __init__(self, capacity: int) -> None:
        """Start empty.

        Args:
            capacity: prefixes remembered, at most.
        """
        self._capacity = capacity
        self._replica_of: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replica_of)

    def record(self, hashes: Sequence[int], replica: str) -> None:
        """``replica`` now holds these prefixes."""
        for value in hashes:
            self._replica_of[value] = replica
            self._replica_of.move_to_end(value)
        while len(self._replica_of) > self._capacity:
            self._replica_of.popitem(last=False)

    def lookup(self, hashes: Sequence[int], replicas: Collection[str]) -> str | None:
        """The replica among ``replicas`` with the longest known prefix, if any."""
        for value in reversed(hashes):
            replica = self._replica_of.get(value)
            if replica is not None and replica in replicas:
                return replica
        return None

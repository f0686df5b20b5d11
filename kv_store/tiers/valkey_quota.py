"""How many bytes one tenant's pages take in the server, and which new ones still fit.

A ledger per namespace (one tenant's pages of one model and fidelity) is a sorted set beside them:

    kv:{<namespace id>:quota}:ledger      "<page hash>:<bytes>" -> when it is looked for, Unix ms
                                          "="                   -> sum of these bytes

Nobody tells when the server evicts a page or its life ends. So with every batch that is written, a
few entries whose time has come and a few others are looked for, and those of pages that have gone
are taken out: bounded work, never a scan. Until then they count, so a tenant may be refused a
little early and never gets much more than its quota; a ledger that the server evicts, or that was
not written to for a while, starts again at zero.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from kv_store.tiers.valkey_exchange import Evaluation, Exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.valkey_batches import ValkeyBatches

LEDGER_SUFFIX = b":quota}:ledger"
TOTAL = b"="

_NUM_DUE = 64
_NUM_RANDOM = 32
# A page that was admitted is not there at once; until then it must not be taken for gone.
_MAX_WRITE_MS = 10_000
_LEDGER_LIVES = 4

_ADMIT = b"""
local ledger, now, limit = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local due, life, settled = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local total = tonumber(redis.call('ZSCORE', ledger, '=') or '0')
local flags, seen = '', {}
local function look(member, score)
  if member ~= '=' and tonumber(score) < settled and not seen[member] then
    seen[member] = true
    seen[#seen + 1] = member
  end
end
local old = redis.call('ZRANGEBYSCORE', ledger, '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[6])
for i = 1, #old, 2 do look(old[i], old[i + 1]) end
local some = redis.call('ZRANDMEMBER', ledger, ARGV[7], 'WITHSCORES')
for i = 1, #some, 2 do look(some[i], some[i + 1]) end
for i = 8, #ARGV, 2 do
  local size = tonumber(ARGV[i + 1])
  if redis.call('ZSCORE', ledger, ARGV[i]) then
    flags = flags .. '1'
  elseif total + size <= limit then
    redis.call('ZADD', ledger, due, ARGV[i])
    total = total + size
    flags = flags .. '1'
  else
    flags = flags .. '0'
  end
end
if total > 0 then
  redis.call('ZADD', ledger, total, '=')
  redis.call('PEXPIRE', ledger, life)
end
return flags .. ' ' .. table.concat(seen, ' ')
"""

_SETTLE = b"""
local ledger, due = KEYS[1], tonumber(ARGV[1])
local total = tonumber(redis.call('ZSCORE', ledger, '=') or '0')
for i = 2, #ARGV, 3 do
  if ARGV[i + 2] == '1' then
    redis.call('ZADD', ledger, 'XX', due, ARGV[i])
  elseif redis.call('ZREM', ledger, ARGV[i]) == 1 then
    total = math.max(0, total - tonumber(ARGV[i + 1]))
  end
end
if redis.call('EXISTS', ledger) == 1 then redis.call('ZADD', ledger, total, '=') end
return ''
"""


class NewPage(NamedTuple):
    """A page that somebody wants to write."""

    key: PageKey
    num_bytes: int


def ledger_name(namespace_id: bytes) -> bytes:
    """Where a namespace's ledger is; within its ACL pattern, and no page's name."""
    return b"kv:{%b%b" % (namespace_id.hex().encode(), LEDGER_SUFFIX)


class TenantQuota:
    """Lives on one event loop; errors of the server are ``TierUnavailableError``."""

    def __init__(
        self,
        batches: ValkeyBatches,
        *,
        limit_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare.

        Args:
            batches: to the server; not owned.
            limit_bytes: of one namespace.
            ttl_s: life of a page after its last read.
            clock: Unix seconds, the same for all replicas to within some seconds.
        """
        self._batches = batches
        self._limit_bytes = limit_bytes
        self._ttl_ms = int(1000 * ttl_s)
        self._clock = clock

    async def admit(self, pages: Sequence[NewPage]) -> list[bool]:
        """Enter pages that still fit; in order, whether each may be written.

        A page that was entered before may always be written. Where a ledger cannot be asked, as
        its shard is down, nothing may.
        """
        admitted = [False] * len(pages)
        by_namespace: dict[bytes, list[int]] = {}
        for index, page in enumerate(pages):
            by_namespace.setdefault(page.key.namespace_id, []).append(index)
        now = int(1000 * self._clock())
        settled = now + self._ttl_ms - min(_MAX_WRITE_MS, self._ttl_ms // 2)
        life_ms = _LEDGER_LIVES * self._ttl_ms
        numbers = (now, self._limit_bytes, now + self._ttl_ms, life_ms, settled)
        fixed = [b"%d" % number for number in (*numbers, _NUM_DUE, _NUM_RANDOM)]
        calls = [
            Evaluation(
                _ADMIT,
                ledger_name(namespace),
                (*fixed, *(word for index in indices for word in _entry(pages[index]))),
            )
            for namespace, indices in by_namespace.items()
        ]
        answers = await self._evaluate(calls)
        for (namespace, indices), answer in zip(by_namespace.items(), answers, strict=True):
            flags, _, members = answer.partition(b" ")
            for index, flag in zip(indices, flags, strict=False):
                admitted[index] = flag == ord("1")
            await self._settle(namespace, members.split(), now + self._ttl_ms)
        return admitted

    async def _settle(self, namespace: bytes, members: Sequence[bytes], due_ms: int) -> None:
        """Take out the entries of pages that have gone; others are looked for again later."""
        names = [
            b"kv:{%b:%b}" % (namespace.hex().encode(), member.partition(b":")[0])
            for member in members
        ]
        if not names:
            return
        # A shard that does not answer is not proof that its pages have gone.
        held = await self._batches.run(Exchange.contains, names, names, miss=True, is_shared=False)
        words = [b"%d" % due_ms]
        for member, is_held in zip(members, held, strict=True):
            words += [member, member.partition(b":")[2], b"1" if is_held else b"0"]
        await self._evaluate([Evaluation(_SETTLE, ledger_name(namespace), tuple(words))])

    async def _evaluate(self, calls: Sequence[Evaluation]) -> list[bytes]:
        names = [call.name for call in calls]
        return await self._batches.run(Exchange.evaluate, calls, names, miss=b"", is_shared=False)


def _entry(page: NewPage) -> tuple[bytes, bytes]:
    member = b"%b:%d" % (page.key.page_hash.hex().encode(), page.num_bytes)
    return member, b"%d" % page.num_bytes

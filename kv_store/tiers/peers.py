"""The pages that other nodes have in their folders; and a server for those of this one's.

A page that this node has written to its SSD tier is published in the hot tier, and again while it
is held. Others find it there, ask the node for it, and verify it as any other page. A node that
does not answer, or gives what is no page, costs its readers a miss, and after a few nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier, TierUsage
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.page_directory import ServerAddress, own_address
from kv_store.tiers.page_server import PageServer
from kv_store.tiers.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.config import PeersTierConfig
    from kv_store.keys import PageKey
    from kv_store.tiers.breaker import CircuitBreaker
    from kv_store.tiers.page_directory import PageDirectory
    from kv_store.tiers.ssd import SsdTier
    from kv_store.tiers.valkey_topology import ValkeyAddress

logger = logging.getLogger(__name__)

_MAX_CONNECTED = 64
_MAX_PEERS = 1024
_MAX_KNOWN_PAGES = 1 << 16
_MAX_NEW_PAGES = 1 << 16
_PUBLISH_BATCH = 512
_RETRY_S = 1.0
# A server that hangs must leave time to hand over what the others gave.
_SERVER_SHARE = 0.9


class PeerTier(KVTier):
    """Reads from other nodes' page servers, found through a directory; takes no pages."""

    takes_pages = False

    def __init__(
        self,
        config: PeersTierConfig,
        directory: PageDirectory,
        *,
        max_page_bytes: int,
        make_breaker: Callable[[], CircuitBreaker],
        publisher: PagePublisher | None = None,
        name: str = "peers",
    ) -> None:
        """Prepare; nothing is sent and nothing listens yet.

        Args:
            config: time limits and bounds.
            directory: in the hot tier; owned.
            max_page_bytes: of one page as stored.
            make_breaker: called for each server.
            publisher: of this node's own pages; owned.
            name: see ``KVTier``.
        """
        self.name = name
        self._config = config
        self._directory = directory
        self._max_page_bytes = max_page_bytes
        self._make_breaker = make_breaker
        self._publisher = publisher
        self._buffers = BufferPool()
        self._peers: OrderedDict[ServerAddress, Peer] = OrderedDict()
        self._connected: OrderedDict[ServerAddress, Peer] = OrderedDict()  # some of them
        self._where: OrderedDict[PageKey, ServerAddress] = OrderedDict()
        self._is_closed = False

    def start(self) -> None:
        """Serve and publish this node's pages."""
        if self._publisher is not None and not self._is_closed:
            self._publisher.start()

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``; where a page was found is remembered."""
        deadline = self._deadline()
        await self._find(keys)
        held = [False] * len(keys)

        async def ask(address: ServerAddress, indices: Sequence[int]) -> None:
            answers = await self._connect(address).contains([keys[i] for i in indices], deadline)
            for index, answer in zip(indices, answers, strict=True):
                held[index] = answer

        await asyncio.gather(*(ask(*item) for item in self._by_server(keys).items()))
        return held

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``."""
        deadline = self._deadline()
        await self._find([key for key in keys if key not in self._where])
        blobs: list[Blob | None] = [None] * len(keys)

        async def fetch(address: ServerAddress, indices: Sequence[int]) -> None:
            answers = await self._connect(address).get([keys[i] for i in indices], deadline)
            for index, blob in zip(indices, answers, strict=True):
                blobs[index] = blob

        size = self._config.max_connections
        shares = [
            (address, indices[start::size])
            for address, indices in self._by_server(keys).items()
            for start in range(min(size, len(indices)))
        ]
        await asyncio.gather(*(fetch(*share) for share in shares))
        return blobs

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """Nothing is written to other nodes."""
        return [False] * len(items)

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """Pages were no good: do not find them again soon, and trust who gave them less."""
        num_known = 0
        for key in keys:
            address = self._where.pop(key, None)
            if address is not None:
                self._peer(address).gave_a_bad_page()
                num_known += 1
        if num_known:
            await self._directory.forget(keys)
        return num_known

    async def aclose(self) -> None:
        """Stop serving and publishing, and close all connections."""
        self._is_closed = True
        if self._publisher is not None:
            await self._publisher.aclose()
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        self._connected.clear()
        self._directory.close()

    def life_s(self, key: PageKey) -> float:
        """Others' pages leave when they like; nothing here may count on them."""
        return 0.0

    def usage(self) -> TierUsage:
        """What other nodes hold is not known; what they were given is."""
        return TierUsage(num_served=self._publisher.num_served if self._publisher else 0)

    async def _find(self, keys: Sequence[PageKey]) -> None:
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
        if not keys:
            return
        own = self._publisher.address if self._publisher else None
        for key, address in zip(keys, await self._directory.find(keys), strict=True):
            self._where.pop(key, None)
            # What this node's folder had, it was asked for before.
            if address is not None and address != own:
                self._where[key] = address
        while len(self._where) > _MAX_KNOWN_PAGES:
            self._where.popitem(last=False)

    def _by_server(self, keys: Sequence[PageKey]) -> dict[ServerAddress, list[int]]:
        """Indices of the pages of each server that may be asked."""
        shares: dict[ServerAddress, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            address = self._where.get(key)
            if address is not None:
                shares[address].append(index)
        return {address: shares[address] for address in shares if self._peer(address).is_trusted}

    def _peer(self, address: ServerAddress) -> Peer:
        """What is known of a server; forgets those not used for longest."""
        peer = self._peers.pop(address, None)
        if peer is None:
            others = (old for old in self._peers if old not in self._connected)
            if len(self._peers) >= _MAX_PEERS and (oldest := next(others, None)) is not None:
                del self._peers[oldest]
            peer = Peer(
                address,
                connect_timeout_s=self._config.connect_timeout_s,
                max_connections=self._config.max_connections,
                max_page_bytes=self._max_page_bytes,
                buffers=self._buffers,
                breaker=self._make_breaker(),
            )
        self._peers[address] = peer
        return peer

    def _connect(self, address: ServerAddress) -> Peer:
        """A server that is about to be asked; hangs up on idle ones not asked for longest."""
        num_more = len(self._connected.keys() | {address}) - _MAX_CONNECTED
        if num_more > 0:
            idle = [old for old, peer in self._connected.items() if peer.is_idle and old != address]
            for old in idle[:num_more]:
                self._connected.pop(old).hang_up()
        peer = self._connected[address] = self._peer(address)
        self._connected.move_to_end(address)
        return peer

    def _deadline(self) -> float:
        return time.monotonic() + self._config.operation_timeout_s * _SERVER_SHARE


class PagePublisher:
    """Serves the pages of an SSD tier, and says in the directory that they are here."""

    def __init__(
        self,
        config: PeersTierConfig,
        directory: PageDirectory,
        *,
        hot_tier: ValkeyAddress,
        ssd: SsdTier,
        max_reads: int,
    ) -> None:
        """Prepare; nothing listens yet.

        Args:
            config: address, bounds, and how long a record lives.
            directory: where pages are published; not owned.
            hot_tier: the way there leads over this node's address, unless one is configured.
            ssd: whose pages; not owned.
            max_reads: pages read for others at once.
        """
        self._config = config
        self._directory = directory
        self._hot_tier = hot_tier
        self._ssd = ssd
        self._token = secrets.token_hex(16)
        self._server = PageServer(
            _LogSource(ssd),
            token=self._token.encode(),
            max_clients=config.max_clients,
            max_reads=max_reads,
        )
        self._new: dict[PageKey, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.address: ServerAddress | None = None

    @property
    def num_served(self) -> int:
        """Pages that other nodes got."""
        return self._server.num_served

    def start(self) -> None:
        """Begin, on the event loop."""
        self._ssd.on_put = self._noted
        self._task = asyncio.get_running_loop().create_task(self._run(), name="kv-publisher")

    async def aclose(self) -> None:
        """Hang up on everybody; the records end by themselves."""
        self._ssd.on_put = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._server.close)

    def _noted(self, keys: Sequence[PageKey]) -> None:
        if len(self._new) < _MAX_NEW_PAGES:  # what does not fit is published with all others
            self._new.update(dict.fromkeys(keys))
            self._wake.set()

    async def _run(self) -> None:
        """Publish everything now and then, and what is new at once; until cancelled."""
        level = logging.WARNING
        while True:
            try:
                server = self.address or await self._listen()
                log = await self._ssd.opened()
                due = time.monotonic() + self._config.record_ttl_s / 3
                await self._publish(log.keys(), server)
                level = logging.WARNING
                while time.monotonic() < due:
                    await self._publish(list(self._new), server)
                    await self._sleep(due - time.monotonic())
            except (TierUnavailableError, OSError) as exc:
                logger.log(level, "pages of this node are not published: %s", exc)
                level = logging.DEBUG  # once is enough
                await asyncio.sleep(_RETRY_S)

    async def _listen(self) -> ServerAddress:
        host = self._config.host or await asyncio.to_thread(own_address, self._hot_tier)
        port = self._server.start(host, self._config.port)
        self.address = ServerAddress(host, port, self._token)
        logger.info("pages of this node are served at %s:%d", host, port)
        return self.address

    async def _publish(self, keys: Sequence[PageKey], server: ServerAddress) -> None:
        for start in range(0, len(keys), _PUBLISH_BATCH):
            batch = keys[start : start + _PUBLISH_BATCH]
            await self._directory.publish(batch, server, self._config.record_ttl_s)
            for key in batch:
                self._new.pop(key, None)

    async def _sleep(self, seconds: float) -> None:
        """Until there is something new, or so long."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()


class _LogSource:
    """An SSD tier's log, once it is open."""

    def __init__(self, ssd: SsdTier) -> None:
        self._ssd = ssd

    def contains(self, key: PageKey) -> bool:
        log = self._ssd.log
        return log is not None and log.contains(key)

    def read(self, key: PageKey) -> Blob | None:
        log = self._ssd.log
        return None if log is None else log.read(key)

"""Pages encrypted and authenticated at rest: AES-256-GCM around every blob of a tier.

    sealed blob = nonce (12 bytes, random) || ciphertext || tag (16 bytes)
    derived     = BLAKE3(key=secret, "paceline kv seal 1" || namespace id), 48 bytes
    key         = the first 32 of them; the other 16 are the namespace id that the tier sees
    bound to    = namespace id || page hash || u32 LE index

So whoever can read the server or the disk learns sizes and hashes of pages and nothing of their
content, and whoever can write there cannot make a page that is taken: what does not open is handed
on as no bytes at all, which the store finds corrupt, deletes and counts. Pages of another secret
have other names, so that they are neither found nor deleted.
"""

from __future__ import annotations

import asyncio
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kv_store.errors import TierUnavailableError
from kv_store.keys import PageKey
from kv_store.tiers.base import Blob, KVTier, TierUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
U = TypeVar("U")

KEY_BYTES = 32
SEAL_BYTES = 12 + 16

_NONCE_BYTES = 12
_CONTEXT = b"paceline kv seal 1"
_INDEX = struct.Struct("<I")
_NAMESPACE_BYTES = 16
_MAX_NAMESPACES = 4096  # they can be derived again
_NOT_OURS = b""


class _Derived(NamedTuple):
    """Of one namespace."""

    cipher: AESGCM
    namespace_id: bytes


class SealedTier(KVTier):
    """Wraps a tier and owns it."""

    def __init__(self, tier: KVTier, secret: bytes, *, num_threads: int = 2) -> None:
        """Seal what goes into a tier.

        Args:
            tier: sees sealed blobs only.
            secret: 32 bytes; with others, pages of before are not found.
            num_threads: pages sealed or opened at once, off the event loop.

        Raises:
            ValueError: the secret has another length.
        """
        if len(secret) != KEY_BYTES:
            raise ValueError(f"an encryption key has {KEY_BYTES} bytes, not {len(secret)}")
        self.name = tier.name
        self.is_shared = tier.is_shared
        self.takes_pages = tier.takes_pages
        self._tier = tier
        self._secret = secret
        self._namespaces: dict[bytes, _Derived] = {}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-seal")
        self._is_closed = False

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        return await self._tier.contains_many(self._outer(keys))

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; what does not open is empty."""
        sealed = await self._tier.get_many(self._outer(keys))
        return await self._each(self._open, list(zip(keys, sealed, strict=True)))

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``."""
        sealed = await self._each(self._seal, items)
        names = self._outer([key for key, _ in items])
        return await self._tier.put_many(list(zip(names, sealed, strict=True)))

    async def delete_namespace(self, namespace_id: bytes) -> int:
        """See ``KVTier``."""
        (outer,) = self._outer([PageKey(namespace_id, bytes(32), 0)])
        return await self._tier.delete_namespace(outer.namespace_id)

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``."""
        return await self._tier.delete_many(self._outer(keys))

    def start(self) -> None:
        """See ``KVTier``."""
        self._tier.start()

    async def aclose(self) -> None:
        """Close the wrapped tier."""
        self._is_closed = True
        await self._tier.aclose()
        self._threads.shutdown(wait=False)

    async def claim_many(self, keys: Sequence[PageKey], duration_s: float) -> list[bool]:
        """See ``KVTier``."""
        return await self._tier.claim_many(self._outer(keys), duration_s)

    def life_s(self, key: PageKey) -> float | None:
        """The wrapped tier's."""
        return self._tier.life_s(key)

    def usage(self) -> TierUsage:
        """The wrapped tier's."""
        return self._tier.usage()

    async def _each(
        self, work: Callable[[PageKey, T], U], items: Sequence[tuple[PageKey, T]]
    ) -> list[U]:
        """In threads, in order."""
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
        loop = asyncio.get_running_loop()
        return list(
            await asyncio.gather(
                *(loop.run_in_executor(self._threads, work, *item) for item in items)
            )
        )

    def _seal(self, key: PageKey, blob: Blob) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._derived(key).cipher.encrypt(nonce, blob, _identity(key))

    def _open(self, key: PageKey, sealed: Blob | None) -> Blob | None:
        if sealed is None:
            return None
        view = memoryview(sealed)
        if len(view) < SEAL_BYTES:
            return _NOT_OURS
        try:
            return self._derived(key).cipher.decrypt(
                bytes(view[:_NONCE_BYTES]), view[_NONCE_BYTES:], _identity(key)
            )
        except InvalidTag:
            return _NOT_OURS

    def _outer(self, keys: Sequence[PageKey]) -> list[PageKey]:
        """What the tier knows the pages by."""
        return [key._replace(namespace_id=self._derived(key).namespace_id) for key in keys]

    def _derived(self, key: PageKey) -> _Derived:
        derived = self._namespaces.get(key.namespace_id)
        if derived is None:
            hasher = blake3.blake3(_CONTEXT + key.namespace_id, key=self._secret)
            material = hasher.digest(length=KEY_BYTES + _NAMESPACE_BYTES)
            if len(self._namespaces) >= _MAX_NAMESPACES:
                self._namespaces.clear()
            derived = _Derived(AESGCM(material[:KEY_BYTES]), material[KEY_BYTES:])
            self._namespaces[key.namespace_id] = derived
        return derived


def _identity(key: PageKey) -> bytes:
    return key.namespace_id + key.page_hash + _INDEX.pack(key.index)

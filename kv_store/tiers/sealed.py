"""Pages encrypted and authenticated at rest: AES-256-GCM around every blob of a tier.

    sealed blob = nonce (12 bytes, random) || ciphertext || tag (16 bytes)
    key         = BLAKE3(key=secret, "paceline kv seal 1" || namespace id)
    bound to    = namespace id || page hash || u32 LE index

So whoever can read the server or the disk learns sizes and hashes of pages and nothing of their
content, and whoever can write there cannot make a page that is taken: what does not open is handed
on as no bytes at all, which the store finds corrupt, deletes and counts.
"""

from __future__ import annotations

import asyncio
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kv_store.tiers.base import Blob, KVTier, TierUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey

KEY_BYTES = 32
SEAL_BYTES = 12 + 16

_NONCE_BYTES = 12
_CONTEXT = b"paceline kv seal 1"
_INDEX = struct.Struct("<I")
_MAX_CIPHERS = 4096  # one a namespace; their keys can be derived again
_NOT_OURS = b""


class SealedTier(KVTier):
    """Wraps a tier and owns it."""

    def __init__(self, tier: KVTier, secret: bytes, *, num_threads: int = 2) -> None:
        """Seal what goes into a tier.

        Args:
            tier: sees sealed blobs only.
            secret: 32 bytes; with others, all pages of before are corrupt.
            num_threads: pages sealed or opened at once, off the event loop.

        Raises:
            ValueError: the secret has another length.
        """
        if len(secret) != KEY_BYTES:
            raise ValueError(f"an encryption key has {KEY_BYTES} bytes, not {len(secret)}")
        self.name = tier.name
        self._tier = tier
        self._secret = secret
        self._ciphers: dict[bytes, AESGCM] = {}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-seal")

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        return await self._tier.contains_many(keys)

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; what does not open is empty."""
        sealed = await self._tier.get_many(keys)
        loop = asyncio.get_running_loop()
        return list(
            await asyncio.gather(
                *(
                    loop.run_in_executor(self._threads, self._open, key, blob)
                    for key, blob in zip(keys, sealed, strict=True)
                )
            )
        )

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``."""
        loop = asyncio.get_running_loop()
        sealed = await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._seal, *item) for item in items)
        )
        return await self._tier.put_many(
            [(key, blob) for (key, _), blob in zip(items, sealed, strict=True)]
        )

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``."""
        return await self._tier.delete_many(keys)

    async def aclose(self) -> None:
        """Close the wrapped tier."""
        await self._tier.aclose()
        self._threads.shutdown(wait=False)

    def usage(self) -> TierUsage:
        """The wrapped tier's."""
        return self._tier.usage()

    def _seal(self, key: PageKey, blob: Blob) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher(key).encrypt(nonce, blob, _identity(key))

    def _open(self, key: PageKey, sealed: Blob | None) -> Blob | None:
        if sealed is None:
            return None
        view = memoryview(sealed)
        if len(view) < SEAL_BYTES:
            return _NOT_OURS
        try:
            return self._cipher(key).decrypt(
                bytes(view[:_NONCE_BYTES]), view[_NONCE_BYTES:], _identity(key)
            )
        except InvalidTag:
            return _NOT_OURS

    def _cipher(self, key: PageKey) -> AESGCM:
        cipher = self._ciphers.get(key.namespace_id)
        if cipher is None:
            derived = blake3.blake3(_CONTEXT + key.namespace_id, key=self._secret).digest()
            if len(self._ciphers) >= _MAX_CIPHERS:
                self._ciphers.clear()
            cipher = self._ciphers[key.namespace_id] = AESGCM(derived)
        return cipher


def _identity(key: PageKey) -> bytes:
    return key.namespace_id + key.page_hash + _INDEX.pack(key.index)

"""The shape of one KV page and everything else that decides its bits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import blake3

PAGE_TOKENS = 64

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """A page is ``[num_layers, 2 (K then V), page_tokens, num_kv_heads, head_dim]``, C order.

    Attributes:
        model_digest: hex digest of the weights (or of what identifies them exactly).
        rope: canonical text of the rotary settings; keys are stored after rotation.
        engine: who computed the page; pages of different engines are never interchangeable.
        kv_policy: what the residency policy keeps; ``full`` for all tokens.
        lora_id: empty for the base model.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16", "bfloat16"]
    model_digest: str
    rope: str
    engine: str = "torch"
    kv_policy: str = "full"
    lora_id: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    page_tokens: int = PAGE_TOKENS

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The page's dimensions."""
        return (self.num_layers, 2, self.page_tokens, self.num_kv_heads, self.head_dim)

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return _DTYPE_BYTES[self.dtype]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one raw page."""
        layers, two, tokens, heads, dim = self.shape
        return layers * two * tokens * heads * dim * self.itemsize

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever any field differs."""
        lines = (f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return blake3.blake3("\n".join(lines).encode()).digest()

"""The codec seam: the raw bytes of a few layers in, packed bytes out, and back.

A page is packed in sections of consecutive layers, so that a later reader can start with the first
layers of a page that is still arriving. A codec sees one section at a time and keeps no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kv_store.keys import EXACT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kv_store.layout import PageLayout

FIRST_CUSTOM_CODEC_ID = 1024
"""Codec ids below this one belong to the built-in codecs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """The layers of one page that are packed together.

    Attributes:
        token_start: position of the page's first token in its text.
    """

    layout: PageLayout
    first_layer: int
    num_layers: int
    token_start: int

    @property
    def nbytes(self) -> int:
        """Raw bytes of these layers."""
        return self.layout.nbytes // self.layout.num_layers * self.num_layers


class Codec(ABC):
    """Packs and unpacks layer groups. Stateless; called from several threads at once."""

    name: ClassVar[str]
    """Short name; part of the fidelity of a lossy codec, hence of every key."""
    codec_id: ClassVar[int]
    """Written into every page; never reused. Custom codecs start at ``FIRST_CUSTOM_CODEC_ID``."""
    is_lossless: ClassVar[bool]
    """Whether ``decode`` gives back every bit ``encode`` was handed."""

    @property
    def fidelity(self) -> str:
        """What keys of pages packed by this codec must be made with."""
        return EXACT if self.is_lossless else f"lossy:{self.name}"

    @abstractmethod
    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> bytes | memoryview:
        """Pack.

        Args:
            raw: [group.nbytes] uint8, read-only, C order [num_layers, 2, page_tokens, num_kv_heads,
                head_dim] of the layout's dtype.
            group: which layers these are.

        Returns:
            The packed bytes, at least one; may alias ``raw``.
        """

    @abstractmethod
    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Unpack into the caller's buffer.

        Args:
            stored: what ``encode`` returned; its checksum has been verified.
            group: which layers these are.
            out: [group.nbytes] uint8; every byte is written.

        Raises:
            PageCorruptError: ``stored`` cannot have come from ``encode``.
        """


def page_words(data: NDArray[np.uint8], layout: PageLayout) -> NDArray[np.unsignedinteger[Any]]:
    """Raw bytes as one unsigned word per value; shares memory. numpy has no bfloat16."""
    return data.view(np.uint32 if layout.itemsize == 4 else np.uint16)

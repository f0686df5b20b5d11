"""``make fuzz-kv``: damaged and forged page bytes never crash a reader and never become a page.

The bytes that page servers and their readers exchange come after that (``page_server``).

Each input starts from a sound blob of some codec and layout and is damaged in one of many ways.
Half of them get right checksums afterwards, as only a forger could give them, so that the checks
behind the checksums are reached: those may be served with other values, but must not crash. All
others must be refused, or be the page as it was written. A number and a seed always give the same
inputs.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kv_store import KVStoreError, PageKey, PageLayout
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from kv_store.page_format import HEADER_BYTES, decode_page, encode_page, section_offsets
from kv_store.tiers.parts import read_manifest
from tests.fuzz import page_server
from tests.kv_pages import make_chain, make_layout, make_page

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kv_store.codecs.base import Codec

_ROW = struct.Struct("<HHIIIQ")
_SAID_EVERY = 100_000


@dataclass(frozen=True, slots=True)
class _Case:
    """A sound blob, and what reading it gives."""

    key: PageKey
    layout: PageLayout
    codec: Codec
    blob: bytes
    page: NDArray[np.uint8]


class WrongPageError(Exception):
    """A reader served what it should not have."""


def make_cases() -> list[_Case]:
    """Every codec, dtype, one and two sections, first page and a later one, and wide channels."""
    cases: list[_Case] = []
    for name in BUILTIN_CODECS:
        for dtype in ("float32", "float16", "bfloat16"):
            for num_layers, index, head_dim in ((1, 0, 4), (9, 1, 4), (1, 1, 48)):
                layout = make_layout(
                    num_layers=num_layers,
                    dtype=dtype,
                    page_tokens=8,
                    num_kv_heads=1,
                    head_dim=head_dim,
                )
                codec = load_codec(name)
                key = make_chain(layout, 2, codec.fidelity)[index]
                blob = bytes(encode_page(key, make_page(layout), layout, codec, created_ms=0))
                page = np.empty(layout.nbytes, np.uint8)
                decode_page(blob, key, layout, {codec.codec_id: codec}, page)
                cases.append(_Case(key, layout, codec, blob, page))
    return cases


def run(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Try inputs; counts by outcome.

    Raises:
        WrongPageError: a damaged blob was served as another page, or a sound one was refused.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    cases = make_cases()
    outcomes = {"refused": 0, "served as written": 0, "served forged values": 0}
    for number in range(num_inputs):
        if number % _SAID_EVERY == 0:
            sys.stderr.write(f"page bytes: {number} of {num_inputs}\n")
        case = rng.choice(cases)
        damaged, is_forged = _damage(case, rng)
        outcomes[_try(case, damaged, is_forged)] += 1
    return outcomes


def _try(case: _Case, blob: bytes, is_forged: bool) -> str:
    section_offsets(blob)
    read_manifest(blob)
    out = np.empty(case.layout.nbytes, np.uint8)
    codecs = {case.codec.codec_id: case.codec}
    try:
        decode_page(blob, case.key, case.layout, codecs, out)
    except KVStoreError:
        if blob == case.blob:
            raise WrongPageError("a sound page was refused") from None
        return "refused"
    if np.array_equal(out, case.page):
        return "served as written"
    if not is_forged:
        raise WrongPageError(f"a damaged {case.codec.name} page was served: {blob.hex()}")
    return "served forged values"


def _damage(case: _Case, rng: random.Random) -> tuple[bytes, bool]:
    """Another blob, and whether somebody went to the length of making its checksums right."""
    blob = bytearray(case.blob)
    kind = rng.randrange(8)
    if kind == 0:  # flipped bits
        for _ in range(rng.randint(1, 4)):
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a torn end
        del blob[rng.randrange(len(blob)) :]
    elif kind == 2:  # more than there should be
        blob += rng.randbytes(rng.randint(1, 64))
    elif kind == 3:  # a stretch of something else
        start = rng.randrange(len(blob))
        size = rng.randint(1, 48)
        blob[start : start + size] = rng.choice((bytes(size), rng.randbytes(size)))
    elif kind == 4:  # a number of the header, often an extreme one
        offset = rng.randrange(0, HEADER_BYTES - 4, 2)
        struct.pack_into("<I", blob, offset, rng.choice((0, 1, 0xFFFFFFFF, rng.getrandbits(32))))
    elif kind == 5:  # a number of the section table
        offset = HEADER_BYTES + rng.randrange(0, _ROW.size - 4, 2)
        struct.pack_into("<I", blob, offset, rng.choice((0, 1, 0x7FFFFFFF, rng.getrandbits(32))))
    elif kind == 6:  # bytes missing within
        start = rng.randrange(len(blob))
        del blob[start : start + rng.randint(1, 32)]
    else:  # noise
        blob = bytearray(rng.randbytes(rng.randrange(300)))
    is_forged = rng.random() < 0.5 and len(blob) >= HEADER_BYTES
    if is_forged:
        _seal(blob)
    return bytes(blob), is_forged


def _seal(blob: bytearray) -> None:
    """Right checksums everywhere, and the right length."""
    (num_sections,) = struct.unpack_from("<I", blob, 12)
    for row in range(min(num_sections, 4)):
        start = HEADER_BYTES + row * _ROW.size
        if start + _ROW.size > len(blob):
            break
        fields = list(_ROW.unpack_from(blob, start))
        data = bytes(blob[fields[2] : fields[2] + fields[3]])
        fields[5] = xxhash.xxh3_64_intdigest(data)
        _ROW.pack_into(blob, start, *fields)
    struct.pack_into("<I", blob, 28, len(blob) - HEADER_BYTES)
    blob[96:112] = xxhash.xxh3_128_digest(bytes(blob[HEADER_BYTES:]))
    struct.pack_into("<I", blob, 124, zlib.crc32(blob[:124]))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    outcomes = run(arguments.inputs, arguments.seed)
    outcomes |= page_server.run(arguments.inputs, arguments.seed)
    for outcome, count in outcomes.items():
        sys.stdout.write(f"{count:10} {outcome}\n")
    sys.stdout.write(f"2 x {arguments.inputs} inputs in {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What holds for any keys, chains, pages and histories of a segment log."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kv_store import EXACT, Namespace, PageCorruptError
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from kv_store.page_format import decode_page, encode_page
from kv_store.tiers.segment_log import SegmentLog
from kv_store.tiers.segment_records import ALIGNMENT
from tests.kv_pages import TENANT_KEY, make_chain, make_layout, make_page, round_trip

LAYOUT = make_layout()
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)
CODECS = st.sampled_from([load_codec(name) for name in BUILTIN_CODECS])


def chain(tokens, tenant_key=TENANT_KEY, layout=LAYOUT, fidelity=EXACT):
    return Namespace(tenant_key, layout, fidelity).chain(tokens)


@given(TOKENS, TOKENS)
def test_chains_agree_exactly_as_far_as_their_pages_do(left, right):
    size = LAYOUT.page_tokens
    pages = [[tuple(t[i : i + size]) for i in range(0, len(t), size)] for t in (left, right)]
    num_equal = 0
    for one, other in zip(*pages, strict=False):
        if one != other or len(one) < size:
            break
        num_equal += 1
    keys = chain(left), chain(right)
    assert keys[0][:num_equal] == keys[1][:num_equal]
    assert not set(keys[0][num_equal:]) & set(keys[1][num_equal:])


@given(TOKENS, TOKENS)
def test_a_chain_grows_without_changing(first, more):
    whole = chain(first + more)
    size = LAYOUT.page_tokens
    assert whole[: len(first) // size] == chain(first)
    assert [key.index for key in whole] == list(range((len(first) + len(more)) // size))


@given(
    TOKENS.filter(lambda tokens: len(tokens) >= 4),
    st.binary(min_size=32, max_size=32).filter(lambda key: key != TENANT_KEY),
    st.sampled_from(["dtype", "rope", "model_digest", "lora_id", "kv_policy", "tp_rank"]),
)
def test_another_tenant_layout_or_fidelity_shares_no_key(tokens, tenant_key, field):
    changed = {"dtype": "float16", "tp_rank": 1}.get(field, "other")
    ours = set(chain(tokens))
    assert not ours & set(chain(tokens, tenant_key=tenant_key))
    assert not ours & set(chain(tokens, layout=make_layout(**{field: changed})))
    assert not ours & set(chain(tokens, fidelity="lossy:int8"))


@given(
    CODECS,
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 10),
    st.integers(0, 1),
)
def test_a_page_of_any_bits_is_stored_and_read_the_same_way_twice(
    codec, dtype, seed, num_layers, index
):
    layout = make_layout(dtype=dtype, num_layers=num_layers, page_tokens=6)
    key = make_chain(layout, 2, codec.fidelity)[index]
    page = np.random.default_rng(seed).integers(0, 256, layout.nbytes, dtype=np.uint8)
    blob = encode_page(key, page, layout, codec, created_ms=0)
    first, second = np.empty_like(page), np.empty_like(page)
    for out in (first, second):
        decode_page(blob, key, layout, {codec.codec_id: codec}, out)
    assert np.array_equal(first, second)
    assert not codec.is_lossless or np.array_equal(first, page)


@given(CODECS, st.integers(0, 2**32 - 1), st.sampled_from([0, 6]))
def test_a_second_trip_through_a_codec_adds_little(codec, seed, token_start):
    layout = make_layout(page_tokens=6)
    once, _ = round_trip(codec, make_page(layout, seed), layout, token_start)
    twice, _ = round_trip(codec, once, layout, token_start)
    assert np.abs(once.view(np.float32) - twice.view(np.float32)).max() < 0.01


@settings(max_examples=60)
@given(CODECS, st.data())
def test_any_change_of_a_blob_is_found(codec, data):
    key = make_chain(LAYOUT, 2, codec.fidelity)[1]
    blob = bytearray(encode_page(key, make_page(LAYOUT), LAYOUT, codec, created_ms=0))
    start = data.draw(st.integers(0, len(blob) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=16))
    before = bytes(blob)
    blob[start : start + len(patch)] = patch
    if bytes(blob) == before:
        return
    with pytest.raises(PageCorruptError):
        decode_page(
            bytes(blob), key, LAYOUT, {codec.codec_id: codec}, np.empty(LAYOUT.nbytes, np.uint8)
        )


KEYS = make_chain(LAYOUT, 24)
KEY = st.sampled_from(KEYS)


class SegmentLogHistory(RuleBasedStateMachine):
    """Whatever happens, a read gives the last bytes put under a key, or nothing.

    Only a tail that was lost may bring back what was there before it: older bytes of the same key.
    """

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.valid = {key: set() for key in KEYS}
        self.ever = {key: set() for key in KEYS}
        self.num_writes = 0
        self.open()

    def open(self):
        self.log = SegmentLog(self.folder, budget_bytes=16 * ALIGNMENT, segment_bytes=4 * ALIGNMENT)

    @rule(key=KEY, num_blocks=st.integers(1, 4))
    def append(self, key, num_blocks):
        self.num_writes += 1
        blob = self.num_writes.to_bytes(4, "little") * (num_blocks * 1000 - 100)
        is_new = not self.log.contains(key)
        assert self.log.append(key, blob)
        if is_new:
            self.valid[key] = {blob}
            self.ever[key].add(blob)
        assert bytes(self.log.read(key)) in self.valid[key]

    @rule(key=KEY)
    def delete(self, key):
        was_held = self.log.contains(key)
        assert self.log.delete(key) == was_held
        assert not self.log.contains(key)
        self.valid[key] = set()

    @rule(key=KEY)
    def read(self, key):
        was_held = self.log.contains(key)
        blob = self.log.read(key)
        assert (blob is not None) == was_held
        assert blob is None or bytes(blob) in self.valid[key]

    @rule()
    def reopen(self):
        before = {key for key in KEYS if self.log.contains(key)}
        self.log.close()
        self.open()
        assert {key for key in KEYS if self.log.contains(key)} == before

    @rule(num_bytes=st.integers(1, 3 * ALIGNMENT))
    def tear_the_tail_and_reopen(self, num_bytes):
        self.log.close()
        segments = sorted(self.folder.glob("segment-*.log"))
        if segments:
            os.truncate(segments[-1], max(0, segments[-1].stat().st_size - num_bytes))
            self.valid = {key: set(blobs) for key, blobs in self.ever.items()}
        self.open()

    @invariant()
    def the_budget_is_kept(self):
        on_disk = sum(path.stat().st_size for path in self.folder.glob("segment-*.log"))
        assert on_disk == self.log.usage().num_bytes <= 16 * ALIGNMENT

    def teardown(self):
        if hasattr(self, "log"):
            self.log.close()
            shutil.rmtree(self.folder)


TestSegmentLogHistory = SegmentLogHistory.TestCase
TestSegmentLogHistory.settings = settings(max_examples=40, stateful_step_count=40)

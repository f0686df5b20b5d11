import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.codecs.raw import RawCodec
from kv_store.page_format import encode_page, section_offsets
from kv_store.tiers.parts import Manifest, is_split, read_manifest, split
from tests.kv_pages import make_chain, make_layout, make_page


@given(
    st.binary(min_size=1, max_size=2000),
    st.lists(st.integers(-5, 2500), max_size=12),
    st.integers(1, 700),
)
def test_manifest_and_parts_are_the_blob(blob, cuts, max_bytes):
    manifest, parts = split(blob, cuts, max_bytes)
    assert manifest.head + b"".join(parts) == blob
    assert manifest.lengths == tuple(map(len, parts))
    assert all(0 < length <= max_bytes for length in manifest.lengths)
    assert manifest.num_bytes == len(blob)
    assert read_manifest(manifest.pack()) == manifest
    names = manifest.part_names(b"kv:{a:b}")
    assert len(set(names)) == len(parts)
    assert all(name.startswith(b"kv:{a:b}:") for name in names)


def test_a_page_is_cut_between_its_layer_groups():
    layout = make_layout(num_layers=40)
    key = make_chain(layout, 1)[0]
    blob = encode_page(key, make_page(layout), layout, RawCodec(), created_ms=0)
    cuts = section_offsets(blob)
    assert len(cuts) == 5
    group = cuts[1] - cuts[0]
    manifest, parts = split(blob, cuts, 2 * group + 1)
    assert bytes(manifest.head) == blob[: cuts[0]]
    assert manifest.lengths == (2 * group, 2 * group, group)
    assert parts[1] == blob[cuts[2] : cuts[4]]


def test_what_is_no_page_has_no_cuts():
    assert section_offsets(b"") == []
    assert section_offsets(bytes(4096)) == []


def test_long_blobs_and_those_that_look_like_a_manifest_are_split():
    assert not is_split(b"KVP1" + bytes(96), 100)
    assert is_split(bytes(101), 100)
    assert is_split(b"KVM1", 100)


def test_two_blobs_of_one_name_have_parts_of_different_names():
    names = [
        split(head + bytes(50), [4], 20)[0].part_names(b"kv:{a:b}") for head in (b"one.", b"two.")
    ]
    assert not set(names[0]) & set(names[1])


def test_two_seals_of_one_page_have_parts_of_different_names():
    names = [
        split(nonce + bytes(500), [], 200)[0].part_names(b"kv:{a:b}")
        for nonce in (b"nonce one...", b"nonce two...")
    ]
    assert len(names[0]) == 2
    assert not set(names[0]) & set(names[1])


def test_a_blob_within_its_head_has_no_parts():
    manifest, parts = split(b"KVM1", [], 100)
    assert (manifest, parts) == (Manifest(b"KVM1", ()), [])
    assert read_manifest(manifest.pack()) == manifest


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"KVP1",
        b"KVM1",
        b"KVM1\x01\0\0\0",
        b"KVM1\xff\xff\xff\xff" + bytes(64),
        Manifest(b"", (1 << 31,)).pack(),
    ],
)
def test_what_is_no_manifest_is_a_blob(value):
    assert read_manifest(value) is None


def test_a_damaged_manifest_is_none():
    packed = split(bytes(range(200)), [20], 50)[0].pack()
    assert read_manifest(packed) is not None
    for position in range(len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 0x10
        assert read_manifest(bytes(damaged)) is None
    for length in range(len(packed)):
        assert read_manifest(packed[:length]) is None

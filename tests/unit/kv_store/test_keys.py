import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store import EXACT, Namespace, PageKey
from tests.kv_pages import TENANT_KEY, make_chain, make_layout

LAYOUT = make_layout()
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=30)


@given(TOKENS, TOKENS)
def test_equal_prefixes_and_only_they_have_equal_keys(left, right):
    namespace = Namespace(TENANT_KEY, LAYOUT, EXACT)
    for number, (a, b) in enumerate(
        zip(namespace.chain(left), namespace.chain(right), strict=False), start=1
    ):
        end = number * LAYOUT.page_tokens
        assert (a == b) == (left[:end] == right[:end])


@given(TOKENS)
def test_chain_is_repeated_extension_and_leaves_out_the_partial_page(tokens):
    namespace = Namespace(TENANT_KEY, LAYOUT, EXACT)
    size = LAYOUT.page_tokens
    parent: PageKey | None = None
    expected = []
    for start in range(0, len(tokens) // size * size, size):
        parent = namespace.extend(parent, tokens[start : start + size])
        expected.append(parent)
    assert namespace.chain(tokens) == expected
    assert [key.index for key in expected] == list(range(len(tokens) // size))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=12, max_size=12), st.integers(0, 11))
def test_one_changed_token_changes_its_page_and_all_behind_it(tokens, position):
    namespace = Namespace(TENANT_KEY, LAYOUT, EXACT)
    changed = list(tokens)
    changed[position] ^= 1
    page = position // LAYOUT.page_tokens
    before, after = namespace.chain(tokens), namespace.chain(changed)
    assert before[:page] == after[:page]
    assert not set(before[page:]) & set(after[page:])


@pytest.mark.parametrize(
    "other",
    [
        Namespace(bytes(32), LAYOUT, EXACT),
        Namespace(TENANT_KEY, make_layout(rope="theta=20000"), EXACT),
        Namespace(TENANT_KEY, LAYOUT, "lossy:int8"),
    ],
    ids=["tenant", "layout", "fidelity"],
)
def test_namespaces_share_no_key(other):
    namespace = Namespace(TENANT_KEY, LAYOUT, EXACT)
    tokens = range(4 * LAYOUT.page_tokens)
    ours, theirs = namespace.chain(tokens), other.chain(tokens)
    assert namespace.namespace_id != other.namespace_id
    assert not {key.page_hash for key in ours} & {key.page_hash for key in theirs}


def test_keys_are_the_same_in_every_process():
    [first, second] = make_chain(LAYOUT, 2)
    assert first.namespace_id.hex() == "086da77529a452ad206a0b188f655135"
    assert (
        first.page_hash.hex() == "5971af9ed278a897a705ecc57863e59c58b743cf0ae4f7e81624c82f1fdda335"
    )
    assert (
        second.page_hash.hex() == "e16b3cf9ca4b3d4f60d36d1a4feff12d2d3f8880456fb5a6b2a852a7b2809f94"
    )


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        Namespace(b"short", LAYOUT, EXACT)
    with pytest.raises(ValueError, match="4 tokens, got 3"):
        Namespace(TENANT_KEY, LAYOUT, EXACT).extend(None, [1, 2, 3])

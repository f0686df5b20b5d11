from __future__ import annotations

import numpy as np
import pytest
import torch

from deployments.engine.torch_engine.kv_cache import KVCache
from kv_store.errors import LayoutMismatchError
from kv_store.layout import PAGE_TOKENS
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    batch_of,
    loaded_model,
    runner_of,
)


def random_cache(dtype, seed=0):
    loaded = loaded_model(dtype=dtype)
    cache = KVCache(loaded.config, 4, dtype=loaded.model.dtype)
    generator = torch.Generator().manual_seed(seed)
    for pool in (cache.k, cache.v):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    return loaded, cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_page_has_the_stores_layout_and_comes_back_bit_for_bit(dtype):
    loaded, cache = random_cache(dtype)
    layout = loaded.page_layout()
    raw = cache.read_page(2)
    assert raw.dtype == np.uint8
    assert raw.shape == (layout.nbytes,)
    page = torch.frombuffer(bytearray(raw), dtype=cache.k.dtype).view(layout.shape)
    for token in (0, 63):
        assert torch.equal(page[1, 0, token], cache.k[1, 2 * PAGE_TOKENS + token])
        assert torch.equal(page[2, 1, token], cache.v[2, 2 * PAGE_TOKENS + token])
    _, other = random_cache(dtype, seed=1)
    untouched = other.read_page(0)
    read_only = np.frombuffer(raw.tobytes(), dtype=np.uint8)
    other.write_page(3, read_only)
    assert np.array_equal(other.read_page(3), raw)
    assert np.array_equal(other.read_page(0), untouched)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_to_a_pages_rows_is_that_page(dtype):
    _, here = random_cache(dtype)
    _, there = random_cache(dtype, seed=1)
    raw, untouched = here.read_page(2), there.read_page(0)
    rows = there.page_rows(3)
    rows[:] = raw.reshape(rows.shape)
    assert np.array_equal(there.read_page(3), raw)
    assert np.array_equal(there.read_page(0), untouched)


def test_odd_bit_patterns_survive():
    _, cache = random_cache("bfloat16")
    raw = np.arange(cache.page_nbytes, dtype=np.uint32).astype(np.uint8)
    cache.write_page(1, raw)
    assert np.array_equal(cache.read_page(1), raw)


def test_a_read_page_is_a_copy():
    _, cache = random_cache("float32")
    raw = cache.read_page(0)
    before = raw.copy()
    cache.k.zero_()
    assert np.array_equal(raw, before)


@pytest.mark.parametrize("size", [0, 1, -1])
def test_bytes_of_another_size_are_refused(size):
    _, cache = random_cache("float32")
    raw = np.zeros(cache.page_nbytes + size if size else 0, dtype=np.uint8)
    with pytest.raises(LayoutMismatchError, match=str(cache.page_nbytes)):
        cache.write_page(0, raw)


def test_rows_are_copied_as_if_all_at_once():
    _, cache = random_cache("float32")
    k, v = cache.k.clone(), cache.v.clone()
    cache.copy_rows(torch.tensor([10, 11, 12]), torch.tensor([11, 12, 200]))
    for before, after in ((k, cache.k), (v, cache.v)):
        assert torch.equal(after[:, [11, 12, 200]], before[:, [10, 11, 12]])
        rest = [slot for slot in range(cache.num_slots) if slot not in (11, 12, 200)]
        assert torch.equal(after[:, rest], before[:, rest])


def test_a_page_moved_to_another_replica_gives_bit_equal_logits():
    loaded = loaded_model()
    here, there = runner_of(loaded), runner_of(loaded)
    text = list(range(1, 71))
    here.forward(batch_of((text[:64], range(64), range(64), [], None)))
    there.kv_cache.write_page(5, here.kv_cache.read_page(0))
    rest = (text[64:], range(64, 70))
    a = here.forward(batch_of((*rest, range(64, 70), range(64), None)))
    b = there.forward(batch_of((*rest, range(6), range(5 * 64, 6 * 64), None)))
    assert torch.equal(a, b)

"""The compiled layers against the modules of ``models``, which transformers vouches for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deployments.engine.torch_engine.kernels.narrow_forward import NarrowForward, obstacle
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.models.llama import Model
from tests.unit.deployments.engine.torch_engine.tiny_models import CONFIGS, batch_of, loaded_model

TEXT = torch.randint(97, (60,), generator=torch.Generator().manual_seed(5)).tolist()
OTHER = torch.randint(97, (60,), generator=torch.Generator().manual_seed(6)).tolist()
SLOTS = torch.randperm(8 * 64, generator=torch.Generator().manual_seed(7)).tolist()
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


def filled_cache(loaded, length=40):
    """A pool that holds TEXT at the first and OTHER at the following slots."""
    cache = KVCache(loaded.config, 8, dtype=loaded.model.dtype)
    loaded.model(
        batch_of(
            (TEXT[:length], range(length), SLOTS[:length], [], None),
            (OTHER[:length], range(length), SLOTS[100 : 100 + length], [], None),
        ),
        cache,
    )
    return cache


def mixed_batch():
    """A decode step, a chain, and a tree at once."""
    return batch_of(
        (TEXT[40:41], [40], SLOTS[40:41], SLOTS[:40], None),
        (OTHER[40:43], range(40, 43), SLOTS[140:143], SLOTS[100:140], None),
        (TEXT[43:47], [20, 21, 21, 22], SLOTS[200:204], SLOTS[:20], TREE),
        logit_rows=[0, 2, 3, 5, 6, 7],
    )


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_rows_are_those_of_the_modules(name, num_threads):
    loaded = loaded_model(name)
    expected_cache, cache = filled_cache(loaded), filled_cache(loaded)
    expected = loaded.model(mixed_batch(), expected_cache).logits
    got = NarrowForward(loaded.model, cache, 16, num_threads).forward(mixed_batch())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.k, expected_cache.k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.v, expected_cache.v, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_multiplied_with_less_rounding_than_in_the_modules(monkeypatch):
    monkeypatch.setattr(Model, "compute_dtype", property(lambda model: model.dtype))
    rounded, exact = loaded_model(dtype="bfloat16"), loaded_model(dtype="bfloat16")
    exact.model.float()
    truth = exact.model(mixed_batch(), filled_cache(exact)).logits
    modules = rounded.model(mixed_batch(), filled_cache(rounded)).logits.float()
    got = NarrowForward(rounded.model, filled_cache(rounded), 16, 2).forward(mixed_batch())
    assert 0 < (got - truth).square().mean() < (modules - truth).square().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_company_nor_threads_change_a_bit(dtype):
    loaded = loaded_model(dtype=dtype)
    cache = filled_cache(loaded)
    alone = NarrowForward(loaded.model, cache, 16, 1)
    expected = [
        alone.forward(batch_of((TEXT[40:41], [40], SLOTS[40:41], SLOTS[:40], None))),
        alone.forward(batch_of((OTHER[40:41], [40], SLOTS[140:141], SLOTS[100:140], None))),
    ]
    chain = (OTHER[40:52], range(40, 52), SLOTS[140:152], SLOTS[100:140], None)
    single = (TEXT[40:41], [40], SLOTS[40:41], SLOTS[:40], None)
    together = NarrowForward(loaded.model, cache, 16, 3).forward(batch_of(chain, single))
    assert torch.equal(together[12], expected[0][0])
    assert torch.equal(together[0], expected[1][0])


def test_contexts_beyond_the_first_scratch_are_seen():
    loaded = loaded_model()
    cache = KVCache(loaded.config, 32, dtype=torch.float32)
    cache.k.normal_(generator=torch.Generator().manual_seed(1))
    cache.v.normal_(generator=torch.Generator().manual_seed(2))
    batch = batch_of((TEXT[:2], [1500, 1501], [1500, 1501], range(1500), None))
    expected = loaded.model(batch, cache).logits
    got = NarrowForward(loaded.model, cache, 16, 2).forward(batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_long_neighbour_changes_no_bit():
    loaded = loaded_model()
    cache = KVCache(loaded.config, 32, dtype=torch.float32)
    cache.k.normal_(generator=torch.Generator().manual_seed(1))
    cache.v.normal_(generator=torch.Generator().manual_seed(2))
    long = (TEXT[:9], range(1500, 1509), range(1500, 1509), range(1500), None)
    short = (OTHER[:1], [70], [1900], range(1600, 1670), None)
    alone = NarrowForward(loaded.model, cache, 16, 1)
    expected = torch.cat([alone.forward(batch_of(one)) for one in (short, long)])
    for num_threads in (1, 2, 3):
        together = NarrowForward(loaded.model, cache, 16, num_threads)
        assert torch.equal(together.forward(batch_of(short, long)), expected)


def test_a_batch_without_wanted_logits_writes_its_rows():
    loaded = loaded_model()
    cache, expected = filled_cache(loaded), filled_cache(loaded)
    batch = batch_of((TEXT[40:43], range(40, 43), SLOTS[40:43], SLOTS[:40], None), logit_rows=[])
    batch = replace(batch, logit_rows=torch.zeros(0, dtype=torch.int64))
    assert NarrowForward(loaded.model, cache, 16, 1).forward(batch).shape == (0, 97)
    loaded.model(batch, expected)
    torch.testing.assert_close(cache.k, expected.k, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_none_stay_visible():
    loaded = loaded_model()
    cache = filled_cache(loaded)
    loaded.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    logits = NarrowForward(loaded.model, cache, 16, 1).forward(mixed_batch())
    assert logits.isnan().all(dim=1).all()


def test_what_the_layers_cannot_compute_is_told():
    loaded = loaded_model()
    cache = KVCache(loaded.config, 2, dtype=torch.float32)
    assert obstacle(loaded.model, cache) is None

    class OwnAttention(loaded.model.attention_class):
        is_standard = False

    loaded.model.attention_class = OwnAttention
    assert "layers of llama" in obstacle(loaded.model, cache)


def test_without_bfloat16_products_the_modules_widen_what_they_read(monkeypatch):
    """Then only the rounding of KV rows sets the two apart."""
    monkeypatch.setattr(Model, "compute_dtype", property(lambda _: torch.float32))
    loaded = loaded_model("qwen2", dtype="bfloat16")
    cache = filled_cache(loaded)
    output = loaded.model(mixed_batch(), filled_cache(loaded), (1, 3))
    assert output.logits.dtype == torch.float32
    assert {feature.dtype for feature in output.features} == {torch.bfloat16}
    got = NarrowForward(loaded.model, cache, 16, 1).forward(mixed_batch())
    torch.testing.assert_close(got, output.logits, rtol=2e-2, atol=2e-2)

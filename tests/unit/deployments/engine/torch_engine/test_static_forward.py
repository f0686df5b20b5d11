"""Padded forwards of fixed shape give what forwards of exact shape give."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.torch_engine.attention import attend, attend_folded, group_spans
from deployments.engine.torch_engine.cuda_graphs import CudaGraphs, _Recording, cuda_graphs
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.static_forward import Bucket, StaticForward, buckets
from tests.unit.deployments.engine.torch_engine.tiny_models import CONFIGS, batch_of, loaded_model

TEXT = torch.randint(97, (90,), generator=torch.Generator().manual_seed(5)).tolist()
OTHER = torch.randint(97, (90,), generator=torch.Generator().manual_seed(6)).tolist()
SLOTS = torch.randperm(8 * 64, generator=torch.Generator().manual_seed(7)).tolist()
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def filled_cache(loaded):
    """A page of rows more than the texts use; TEXT and OTHER begin at slots of their own."""
    cache = KVCache(loaded.config, 9, dtype=loaded.model.dtype)
    loaded.model(
        batch_of(
            (TEXT[:40], range(40), SLOTS[:40], [], None),
            (OTHER[:80], range(80), SLOTS[100:180], [], None),
        ),
        cache,
    )
    return cache


def decode():
    return batch_of(
        (TEXT[40:41], [40], SLOTS[40:41], SLOTS[:40], None),
        (OTHER[80:81], [80], SLOTS[180:181], SLOTS[100:180], None),
    )


def verify():
    """A chain, a tree, and a sequence that only decodes."""
    return batch_of(
        (TEXT[40:43], range(40, 43), SLOTS[40:43], SLOTS[:40], None),
        (OTHER[80:84], [80, 81, 81, 82], SLOTS[180:184], SLOTS[100:180], TREE),
        (TEXT[43:44], [20], SLOTS[200:201], SLOTS[:20], None),
        logit_rows=[0, 2, 3, 4, 6, 7],
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    loaded = loaded_model(name)
    cache, expected_cache = filled_cache(loaded), filled_cache(loaded)
    static = StaticForward(loaded.model, cache, Bucket(num_spans=4, length=5, context=96), (1, 3))
    # A smaller batch behind a larger one: nothing of the first may be left in the buffers.
    for batch in (verify(), decode(), verify()):
        expected = loaded.model(batch, expected_cache, (1, 3))
        rows = static.load(batch)
        got = static.compute()
        assert got.logits.isfinite().all()
        got_logits = got.logits[rows[batch.logit_rows]]
        torch.testing.assert_close(got_logits, expected.logits, rtol=1e-4, atol=1e-4)
        for feature, its in zip(got.features, expected.features, strict=True):
            torch.testing.assert_close(feature[rows], its, rtol=1e-4, atol=1e-4)
    own = cache.num_slots - 1
    for got_rows, rows in ((cache.k, expected_cache.k), (cache.v, expected_cache.v)):
        torch.testing.assert_close(got_rows[:, :own], rows[:, :own], rtol=1e-4, atol=1e-4)


def test_heads_may_be_folded_into_rows():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(7, 4, 16, generator=generator)
    k, v = torch.randn(2, 9 * 64, 2, 16, generator=generator)
    groups = group_spans(verify(), torch.float32, torch.device("cpu"))
    masked = [group for group in groups if group.mask is not None]
    assert masked
    for group in masked:
        rows = (group.num_spans, -1)
        folded = attend_folded(
            q[group.rows].view(*rows, 4, 16),
            k[group.slots].view(*rows, 2, 16),
            v[group.slots].view(*rows, 2, 16),
            group.mask,
        )
        expected = attend(q, k, v, [group])[group.rows]
        torch.testing.assert_close(folded.flatten(0, 1), expected)


def test_buckets_are_few_and_the_cheapest_fit_is_the_first():
    shapes = buckets(12, (1, 5), 3000)
    assert {shape.num_spans for shape in shapes} == {1, 2, 4, 8, 12}
    assert {shape.length for shape in shapes} == {1, 5}
    assert {shape.context for shape in shapes} == {256, 1024, 3000}
    assert next(shape for shape in shapes if shape.holds(decode())) == (2, 1, 256)
    assert next(shape for shape in shapes if shape.holds(verify())) == (4, 5, 256)
    assert buckets(1, (1, 1), 100) == [(1, 1, 100)]
    assert max(b.num_spans * b.context for b in buckets(256, (1,), 131072)) == 1 << 17
    chunk = batch_of((TEXT, range(90), SLOTS[:90], [], None))
    assert not any(shape.holds(chunk) for shape in shapes)


class FakeGraph:
    """Computes anew instead of replaying, into the same memory."""

    def __init__(self, forward, output):
        self._forward = forward
        self._output = output
        self.num_replays = 0

    def replay(self):
        self.num_replays += 1
        computed = self._forward.compute()
        self._output.logits.copy_(computed.logits)
        for own, feature in zip(self._output.features, computed.features, strict=True):
            own.copy_(feature)


def test_the_runner_replays_what_fits_and_computes_the_rest():
    loaded = loaded_model()
    cache, expected_cache = filled_cache(loaded), filled_cache(loaded)
    assert cuda_graphs(loaded.model, cache, max_num_seqs=2, num_draft_tokens=4, max_context=96) is (
        None
    )
    graphs = CudaGraphs.__new__(CudaGraphs)
    graphs._recordings = []
    graphs._capture_layers = (1, 2)
    for bucket in (Bucket(2, 1, 96), Bucket(4, 4, 96)):
        forward = StaticForward(loaded.model, cache, bucket, (1, 2))
        output = forward.compute()
        graphs._recordings.append(_Recording(forward, FakeGraph(forward, output), output))
    runner = ModelRunner(loaded.model, loaded.config, cache, graphs=graphs)
    runner._narrow = None
    chunk = batch_of((TEXT[:60], range(60), SLOTS[300:360], [], None), logit_rows=[59])
    for batch in (decode(), verify(), chunk, decode()):
        expected = loaded.model(batch, expected_cache).logits
        kept = runner.forward(batch)
        runner.forward(decode())  # what was returned is not overwritten by the next replay
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
    assert [recording.graph.num_replays for recording in graphs._recordings] == [6, 1]
    # Features that were recorded are replayed; with others the model computes.
    for layers in ((2,), (2, 1), (0, 1)):
        logits, features = runner.forward_with_features(decode(), layers)
        expected = loaded.model(decode(), expected_cache, layers)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        for feature, its in zip(features, expected.features, strict=True):
            torch.testing.assert_close(feature, its, rtol=1e-4, atol=1e-4)
    assert graphs._recordings[0].graph.num_replays == 8

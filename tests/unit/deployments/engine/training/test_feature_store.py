from __future__ import annotations

import pytest
import torch

from deployments.engine.training.errors import RunMismatchError
from deployments.engine.training.feature_store import FeatureStore
from tests.unit.deployments.engine.training.tiny_training import texts

PLENTY = 1 << 30


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_texts_come_back_in_order(tmp_path):
    store = FeatureStore(tmp_path, fingerprint="one")
    assert list(store.extend(texts(), texts_per_shard=5, max_bytes=PLENTY)) == [5, 10, 12]
    for reopened in (store, FeatureStore(tmp_path, fingerprint="one")):
        assert reopened.lengths == [text.num_tokens for text in texts()]
        assert all(same(reopened.text(i), text) for i, text in enumerate(texts()))
        with pytest.raises(IndexError):
            reopened.text(12)


def test_an_interrupted_capture_goes_on_behind_its_last_shard(tmp_path):
    store = FeatureStore(tmp_path, fingerprint="one")
    capture = store.extend(texts(), texts_per_shard=5, max_bytes=PLENTY)
    next(capture)
    (tmp_path / "features-000001.partial").write_bytes(b"half a shard")
    again = FeatureStore(tmp_path, fingerprint="one")
    assert again.num_texts == 5
    list(again.extend(texts()[5:], texts_per_shard=5, max_bytes=PLENTY))
    assert all(same(again.text(i), text) for i, text in enumerate(texts()))


def test_a_full_folder_takes_no_more(tmp_path):
    store = FeatureStore(tmp_path, fingerprint="one")
    list(store.extend(texts()[:5], texts_per_shard=5, max_bytes=PLENTY))
    assert list(store.extend(texts(), texts_per_shard=5, max_bytes=store.num_bytes)) == []
    assert store.num_texts == 5


def test_features_of_something_else_are_refused(tmp_path):
    list(
        FeatureStore(tmp_path, fingerprint="one").extend(
            texts()[:2], texts_per_shard=5, max_bytes=PLENTY
        )
    )
    with pytest.raises(RunMismatchError, match="another target"):
        FeatureStore(tmp_path, fingerprint="two")
    (tmp_path / "features-000000.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunMismatchError, match="cannot be read"):
        FeatureStore(tmp_path, fingerprint="one")

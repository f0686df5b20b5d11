"""What a replica offers its SGLang for sharing pages."""

from __future__ import annotations

import json

import pytest

from deployments.engine.config import EngineConfig, SGLangConfig
from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine import runtime, start
from kv_store import KVStoreConfig

KV = KVStoreConfig(codec="lossless")


def settings_of(kv=KV, digest=lambda: "d", dtype="bfloat16", **changes):
    sglang = SGLangConfig(**changes)
    config = EngineConfig(kind="sglang", sglang=sglang, dtype=dtype, kv_load_timeout_s=3.0)
    return start._tier_settings(config, kv, digest)


def test_all_that_decides_bits_is_named():
    settings = settings_of()
    assert (settings.kv, settings.model_digest, settings.load_timeout_s) == (KV, "d", 3.0)
    for changes in (
        {"attention_backend": "fa3"},
        {"extra_args": {"quantization": "fp8"}},
        {"dtype": "float32"},
    ):
        other = settings_of(**changes)
        assert other.arithmetic != settings.arithmetic
        json.loads(other.arithmetic)


def never() -> str:
    raise AssertionError("the model was read in vain")


def test_a_sglang_that_moved_serves_without_what_moved(monkeypatch, caplog):
    moved = {runtime.SHARING: ["a method is missing"], runtime.DRAFTING: []}
    monkeypatch.setattr(runtime, "differences", moved.get)
    assert (runtime.can_share(), runtime.can_draft()) == (False, True)
    assert "SGLang cannot share pages: a method is missing" in caplog.text
    moved = {runtime.SHARING: [], runtime.DRAFTING: ["a field is missing"]}
    monkeypatch.setattr(runtime, "differences", moved.get)
    assert (runtime.can_share(), runtime.can_draft()) == (True, False)
    assert "SGLang cannot verify drafts of the pool: a field is missing" in caplog.text


def test_a_lossy_codec_is_refused_before_the_model_is_read():
    with pytest.raises(EngineSetupError, match=r"kv\.codec: int8 loses"):
        settings_of(kv=KVStoreConfig(codec="int8"), digest=never)

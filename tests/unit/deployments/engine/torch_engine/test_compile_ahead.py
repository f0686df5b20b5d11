"""Machine code made by another process is that of real forwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from deployments.engine.torch_engine import compile_ahead as module
from deployments.engine.torch_engine.compile_ahead import compile_ahead
from deployments.engine.torch_engine.kernels.compiling import code_file
from deployments.engine.torch_engine.kernels.narrow_forward import NarrowForward
from deployments.engine.torch_engine.kernels.step import run_layers
from deployments.engine.torch_engine.kv_cache import KVCache
from tests.unit.deployments.engine.torch_engine.tiny_models import batch_of, loaded_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_forwards_have_the_types_that_were_compiled(dtype):
    module._main(dtype)
    compiled = set(run_layers.signatures)
    loaded = loaded_model(dtype=dtype)
    cache = KVCache(loaded.config, 8, dtype=loaded.model.dtype)
    batch = batch_of(([5, 6, 7], range(3), [0, 1, 2], [], None))
    with torch.inference_mode():
        NarrowForward(loaded.model, cache, 2, 3).forward_with_features(batch, (1, -1))
    assert set(run_layers.signatures) == compiled
    assert len(compiled) <= 2
    assert code_file(module._mark(dtype)).exists()


def test_what_is_compiled_starts_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "code_file", lambda name: tmp_path / name)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    (tmp_path / module._mark("bfloat16")).touch()
    compile_ahead(torch.bfloat16)
    with pytest.raises(pytest.fail.Exception):
        compile_ahead(torch.float32)


def test_nowhere_to_write_starts_no_process(monkeypatch):
    monkeypatch.setattr(module, "code_file", lambda _: None)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    compile_ahead(torch.float32)


def test_a_compiler_that_fails_is_told_and_no_more(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(module, "code_file", lambda name: tmp_path / name)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compile_ahead(torch.float32)
    assert "compiling ahead failed" in caplog.text


def test_the_process_compiles_and_leaves_its_mark(monkeypatch):
    started = []
    run = subprocess.run

    def noted(command, **options):
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr(module.subprocess, "run", noted)
    mark = code_file(module._mark("float32"))
    mark.unlink(missing_ok=True)
    compile_ahead(torch.float32)
    assert len(started) == 1
    assert mark.exists()

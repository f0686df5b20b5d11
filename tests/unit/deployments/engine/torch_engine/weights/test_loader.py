from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from deployments.engine.errors import WeightsMismatchError, WeightsMissingError
from deployments.engine.torch_engine.weights.folders import find_model_folder
from deployments.engine.torch_engine.weights.loader import (
    default_cache_dir,
    load_model,
    weights_digest,
)
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    CONFIGS,
    batch_of,
    reference_logits,
    reference_model,
    runner_of,
)


def load(folder, cache_dir="unused", dtype="float32"):
    return load_model(str(folder), dtype=dtype, cache_dir=cache_dir)


def save_changed(folder, change):
    """The tiny Llama's checkpoint with ``change`` applied to its tensors."""
    reference = reference_model("llama")
    reference.config.save_pretrained(folder)
    tensors = {name: t.clone() for name, t in reference.state_dict().items()}
    tensors.pop("lm_head.weight")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_checkpoint_computes_the_same(name, tmp_path):
    reference_model(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    text = [1, 5, 9, 2, 40]
    batch = batch_of((text, range(5), range(5), [], None))
    got = runner_of(load(tmp_path)).forward(batch)
    torch.testing.assert_close(got, reference_logits(name, text), rtol=1e-4, atol=1e-4)


def test_a_second_copy_of_a_tied_head_and_old_rope_tables_are_no_error(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    save_changed(tmp_path, change)
    assert load(tmp_path).config.num_layers == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing.*layers.1.mlp.up_proj"),
        (lambda t: t.update({"model.layers.9.extra": torch.zeros(1)}), r"layers\.9\.extra.*place"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), r"model\.norm.*\(5,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, named, tmp_path):
    save_changed(tmp_path, change)
    with pytest.raises(WeightsMismatchError, match=named) as caught:
        load(tmp_path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_a_missing_shard_and_an_empty_folder_are_named(tmp_path):
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsMissingError, match=shard.name):
        load(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(WeightsMissingError, match="safetensors"):
        load(empty)


def test_missing_models_name_the_command_that_fetches_them(tmp_path, monkeypatch):
    with pytest.raises(WeightsMissingError, match="paceline fetch"):
        find_model_folder("smollm2-135m-instruct", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("some/model", "no such folder/at all"):
        with pytest.raises(WeightsMissingError, match=f"paceline fetch --model {name}"):
            find_model_folder(name, tmp_path)


def test_the_digest_follows_weights_and_settings(tmp_path):
    save_changed(tmp_path, lambda t: None)
    first = weights_digest(tmp_path)
    assert load(tmp_path).weights_digest == first == load(tmp_path, dtype="bfloat16").weights_digest
    save_changed(tmp_path, lambda t: t["model.norm.weight"].mul_(1.5))
    second = weights_digest(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert len({first, second, weights_digest(tmp_path)}) == 3


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "paceline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "paceline"

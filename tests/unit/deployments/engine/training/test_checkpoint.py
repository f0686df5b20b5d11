from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.engine.errors import (
    UnsupportedModelError,
    WeightsMismatchError,
    WeightsMissingError,
)
from deployments.engine.training.checkpoint import load_head, save_head
from deployments.engine.training.training_time_test import unroll
from tests.unit.deployments.engine.training.tiny_training import batch, head, target


@pytest.fixture
def folder(tmp_path):
    save_head(head(), tmp_path, torch.float32)
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_an_export_computes_the_same_logits(folder):
    ours, loaded = head(), load_head(folder)
    embedding = target().model.embed_tokens.weight
    for a, b in zip(
        unroll(ours, embedding, batch(), 3), unroll(loaded, embedding, batch(), 3), strict=True
    ):
        assert torch.equal(ours.logits(a.hidden), loaded.logits(b.hidden))
    assert torch.equal(ours.draft_token_ids, loaded.draft_token_ids)


def test_the_names_are_those_that_sglang_loads(folder):
    names = set(load_file(folder / "model.safetensors"))
    projections = {f"midlayer.self_attn.{x}_proj.weight" for x in "qkvo"}
    projections |= {f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    norms = {
        f"midlayer.{x}.weight"
        for x in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    }
    assert names == projections | norms | {
        "fc.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
        "t2d",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 2]


def test_offsets_lead_from_the_draft_s_to_the_target_s_ids(folder):
    tensors = load_file(folder / "model.safetensors")
    ids = torch.arange(40) + tensors["d2t"]
    assert torch.equal(ids, tensors["t2d"].nonzero().flatten())


@pytest.mark.parametrize("name", ["d2t", "t2d", "fc.weight", "lm_head.weight", "norm.weight"])
def test_a_missing_tensor_is_refused(folder, name):
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsMismatchError, match=f"'{name}' is missing"):
        load_head(folder)


def test_an_unknown_tensor_is_refused(folder):
    change(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(WeightsMismatchError, match="'extra' is unknown"):
        load_head(folder)


def test_another_shape_is_refused(folder):
    change(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(3)}))
    with pytest.raises(WeightsMismatchError, match=r"norm\.weight"):
        load_head(folder)


def absolute_ids(tensors):
    tensors["d2t"] += torch.arange(40)


def another_mask(tensors):
    tensors["t2d"] = tensors["t2d"].roll(1)


@pytest.mark.parametrize("damage", [absolute_ids, another_mask])
def test_a_contradictory_vocabulary_is_refused(folder, damage):
    change(folder, damage)
    with pytest.raises(WeightsMismatchError, match="d2t"):
        load_head(folder)


@pytest.mark.parametrize(
    "change_of",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"fc_norm": True},
        {"num_hidden_layers": 2},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    ],
)
def test_what_is_not_computed_is_refused(folder, change_of):
    change_config(folder, **change_of)
    with pytest.raises(UnsupportedModelError):
        load_head(folder)


def test_missing_and_broken_files_are_told_apart(folder, tmp_path_factory):
    with pytest.raises(WeightsMissingError):
        load_head(tmp_path_factory.mktemp("empty"))
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(WeightsMismatchError, match="cannot be read"):
        load_head(folder)

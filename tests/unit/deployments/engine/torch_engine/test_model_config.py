from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deployments.engine.errors import UnsupportedModelError, WeightsMissingError
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.rotary import RopeConfig, inverse_frequencies

RAW = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


def test_defaults_and_derived_sizes():
    config = ModelConfig.from_hf(RAW)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.eos_token_ids == ()


def test_old_and_new_rope_settings_mean_the_same():
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    old = ModelConfig.from_hf({**RAW, "rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelConfig.from_hf({**RAW, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old.rope == new.rope
    assert old.rope.scaling == "llama3"
    reference, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(**RAW, rope_parameters={**scaling, "rope_theta": 5e5}), "cpu"
    )
    torch.testing.assert_close(inverse_frequencies(old.rope, 16), reference)


def test_the_layouts_text_tells_rotations_apart():
    texts = {
        RopeConfig().canonical_text(),
        RopeConfig(theta=5e5).canonical_text(),
        RopeConfig(scaling="linear", factor=2.0).canonical_text(),
        RopeConfig(scaling="linear", factor=4.0).canonical_text(),
        RopeConfig(scaling="llama3", factor=4.0).canonical_text(),
        RopeConfig(scaling="llama3", factor=4.0, low_freq_factor=2.0).canonical_text(),
        RopeConfig(scaling="yarn", factor=4.0).canonical_text(),
        RopeConfig(scaling="yarn", factor=4.0, beta_slow=2.0).canonical_text(),
        RopeConfig(scaling="yarn", factor=4.0, amplitude=1.1).canonical_text(),
    }
    assert len(texts) == 9


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
    ],
)
def test_what_would_give_other_text_is_refused(extra, named):
    with pytest.raises(UnsupportedModelError, match=named):
        ModelConfig.from_hf({**RAW, **extra})


@pytest.mark.parametrize(
    ("extra", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, 4096),
    ],
)
def test_a_window_counts_where_a_layer_has_it(extra, window):
    assert ModelConfig.from_hf({**RAW, **extra}).sliding_window == window


@pytest.mark.parametrize("extra", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_yarn_is_that_of_transformers(extra, head_dim):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = {**RAW, "head_dim": head_dim, "rope_theta": 1e6, "rope_scaling": {**scaling, **extra}}
    rope = ModelConfig.from_hf(raw).rope
    parameters = {**scaling, **extra, "rope_theta": 1e6}
    frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](
        LlamaConfig(**RAW, head_dim=head_dim, rope_parameters=parameters), "cpu"
    )
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), frequencies)
    assert rope.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize("key", RAW)
def test_a_missing_key_is_named(key):
    with pytest.raises(UnsupportedModelError, match=key):
        ModelConfig.from_hf({name: value for name, value in RAW.items() if name != key})


def test_end_tokens_of_both_files_count(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**RAW, "eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2, 7)
    with pytest.raises(WeightsMissingError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path / "nowhere")

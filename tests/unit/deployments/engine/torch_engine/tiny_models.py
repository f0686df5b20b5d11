"""Tiny random models, ours and transformers', with the same weights."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import EngineParts
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.models import model_class
from deployments.engine.torch_engine.weights.loader import LoadedModel, fill_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA_1E6 = {"rope_type": "default", "rope_theta": 1e6}
CONFIGS = {
    "llama": lambda: (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-biased-untied": lambda: (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True),
    ),
    "llama3-rope": lambda: (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE)),
    "linear-rope": lambda: (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
        ),
    ),
    "llama-one-kv-head": lambda: (
        LlamaForCausalLM,
        LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}, head_dim=32, tie_word_embeddings=True),
    ),
    "qwen2": lambda: (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen2-tied-yarn": lambda: (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SHAPE,
            tie_word_embeddings=True,
            rope_parameters=YARN_ROPE,
            use_sliding_window=True,
            sliding_window=150,
            max_window_layers=1,
        ),
    ),
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
    "qwen3-biased-tied": lambda: (
        Qwen3ForCausalLM,
        Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True, attention_bias=True),
    ),
    "mistral": lambda: (
        MistralForCausalLM,
        MistralConfig(**SHAPE, sliding_window=None, rope_parameters=THETA_1E6),
    ),
    "mistral-windowed": lambda: (
        MistralForCausalLM,
        MistralConfig(
            **{**SHAPE, "num_key_value_heads": 4},
            head_dim=32,
            sliding_window=150,
            tie_word_embeddings=True,
        ),
    ),
}


TOY_CONFIGS = {
    "llama-of-24-tokens": lambda: (LlamaForCausalLM, LlamaConfig(**{**SHAPE, "vocab_size": 24})),
    "llama-of-6-layers": lambda: (
        LlamaForCausalLM,
        LlamaConfig(
            **{**SHAPE, "num_hidden_layers": 6, "intermediate_size": 64}, tie_word_embeddings=True
        ),
    ),
    "biased-qwen3-of-6-layers": lambda: (
        Qwen3ForCausalLM,
        Qwen3Config(
            **{**SHAPE, "num_hidden_layers": 6, "intermediate_size": 64},
            head_dim=16,
            attention_bias=True,
        ),
    ),
}


@functools.cache
def reference_model(name):
    torch.manual_seed(11)
    cls, config = (CONFIGS | TOY_CONFIGS)[name]()
    model = cls(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "norm.weight")):
                parameter.uniform_(0.5, 1.5)
    return model


def loaded_model(name="llama", dtype="float32"):
    reference = reference_model(name)
    config = ModelConfig.from_hf(reference.config.to_dict())
    model = model_class(config.model_type)(config, dtype=getattr(torch, dtype))
    fill_model(model, reference.state_dict().items())
    return LoadedModel(model=model, config=config, weights_digest=name, folder=Path(), dtype=dtype)


def runner_of(loaded, num_pages=8):
    cache = KVCache(loaded.config, num_pages, dtype=loaded.model.dtype)
    return ModelRunner(loaded.model, loaded.config, cache)


def parts_of(loaded, config, speculator=None, store=None):
    """What an engine needs to serve a tiny model."""
    memory = KVCache(loaded.config, config.num_pages, dtype=loaded.model.dtype)
    return EngineParts(
        runner=ModelRunner(loaded.model, loaded.config, memory),
        memory=memory,
        layout=loaded.page_layout(),
        vocab_size=loaded.config.vocab_size,
        max_positions=loaded.config.max_positions,
        eos_token_ids=frozenset(loaded.config.eos_token_ids),
        store=store,
        speculator=speculator or NoSpeculation(),
        detokenize=lambda token_ids: "".join(chr(64 + token) for token in token_ids),
    )


def batch_of(*parts, logit_rows=None):
    """Parts: (token ids, positions, slots written, earlier slots, tail mask or None)."""
    spans, tokens, positions, slots = [], [], [], []
    for token_ids, its_positions, its_slots, earlier, tail_mask in parts:
        kv_slots = torch.tensor([*earlier, *its_slots])
        spans.append(
            SequenceSpan(
                start=len(tokens), length=len(token_ids), kv_slots=kv_slots, tail_mask=tail_mask
            )
        )
        tokens += token_ids
        positions += its_positions
        slots += its_slots
    rows = range(len(tokens)) if logit_rows is None else logit_rows
    return ForwardBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(list(positions)),
        slots=torch.tensor(slots),
        spans=tuple(spans),
        logit_rows=torch.tensor(list(rows)),
    )


@torch.inference_mode()
def reference_logits(name, token_ids):
    return reference_model(name)(torch.tensor([token_ids])).logits[0]

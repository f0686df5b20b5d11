"""Tiny random models, ours and transformers', with the same weights."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
    "qwen2": lambda: (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
}


TOY_CONFIGS = {
    "llama-of-24-tokens": lambda: (LlamaForCausalLM, LlamaConfig(**{**SHAPE, "vocab_size": 24})),
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

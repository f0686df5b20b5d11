"""Floating point operations of what is timed: products of matrices alone, so never too many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.torch_engine.model_config import ModelConfig


def layer_flops(config: ModelConfig) -> int:
    """Of all layers for one token, its attention over earlier rows left out."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    outputs = config.num_heads * config.head_dim
    weights = config.hidden_size * (heads + outputs + 3 * config.intermediate_size)
    return 2 * config.num_layers * weights


def attention_flops(config: ModelConfig, num_rows: int) -> int:
    """Of all layers for one token that sees so many rows."""
    return 4 * config.num_layers * config.num_heads * config.head_dim * num_rows


def head_flops(config: ModelConfig) -> int:
    """To score the vocabulary behind one token."""
    return 2 * config.hidden_size * config.vocab_size


def text_flops(config: ModelConfig, num_tokens: int, num_scored: int) -> int:
    """Of a text that is read from its first token on, scoring the vocabulary behind some."""
    seen = num_tokens * (num_tokens + 1) // 2
    return (
        num_tokens * layer_flops(config)
        + attention_flops(config, 1) * seen
        + num_scored * head_flops(config)
    )


def counted(run: Callable[[], object]) -> int:
    """Of whatever torch multiplies in a call, forwards and backwards; not of fused attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())

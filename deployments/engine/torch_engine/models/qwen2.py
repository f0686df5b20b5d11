"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import ClassVar

from deployments.engine.torch_engine.models import llama


class Attention(llama.Attention):
    """The biases are part of the family; no setting of the checkpoint announces them."""

    has_qkv_bias: ClassVar[bool] = True


class Model(llama.Model):
    """The Qwen2 family."""

    attention_class: ClassVar[type[llama.Attention]] = Attention

"""Qwen3 (dense): Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from typing import ClassVar

from deployments.engine.torch_engine.models import llama


class Attention(llama.Attention):
    """Each head goes to unit root mean square, times a learned scale, before it is rotated."""

    has_head_norms: ClassVar[bool] = True


class Model(llama.Model):
    """The Qwen3 family."""

    attention_class: ClassVar[type[llama.Attention]] = Attention

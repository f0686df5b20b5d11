"""What a model is made of, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.rotary import RopeConfig
from deployments.engine.torch_engine.weights.folders import read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder with rotary positions, grouped queries and gated SiLU.

    What sets one family apart from another (biases, norms on queries and keys) is the business of
    its file in ``models/``.

    Attributes:
        model_type: the family's name, which is also its file's.
        attention_bias: the checkpoint's own setting; families may have biases without it.
        max_positions: the context length the model was trained for.
        eos_token_ids: any of them ends a text; empty if the model names none.
        sliding_window: rows that some layer sees at most; None where all layers see all rows.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None

    def check_context(self, num_tokens: int) -> None:
        """Make sure that texts of this length are computed as the model means them.

        Raises:
            UnsupportedModelError: they are longer than the model's window. Attention here always
                sees the whole text, which is the same thing only as long as the window hides
                nothing.
        """
        if self.sliding_window is not None and num_tokens > self.sliding_window:
            raise UnsupportedModelError(
                f"texts of {num_tokens} tokens with a sliding window of {self.sliding_window}; "
                f"set max_model_len to {self.sliding_window} or less"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` and, for the end tokens, ``generation_config.json``.

        Raises:
            WeightsMissingError: there is no ``config.json``.
            UnsupportedModelError: the model cannot be run here.
        """
        name = "generation_config.json"
        generation = read_settings(folder, name) if (folder / name).is_file() else {}
        return cls.from_hf(read_settings(folder), generation)

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Translate the parsed ``config.json``.

        Args:
            raw: the file's content.
            generation: the content of ``generation_config.json``; its end tokens are added.

        Raises:
            UnsupportedModelError: a key is missing, or the model asks for what is not computed.
        """
        _refuse_what_cannot_run(raw)
        try:
            num_heads = int(raw["num_attention_heads"])
            head_dim = raw.get("head_dim") or raw["hidden_size"] // num_heads
            config = cls(
                model_type=str(raw["model_type"]),
                hidden_size=int(raw["hidden_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
                head_dim=int(head_dim),
                intermediate_size=int(raw["intermediate_size"]),
                vocab_size=int(raw["vocab_size"]),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope=rope_config(raw),
                max_positions=int(raw["max_position_embeddings"]),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_ids=_eos_token_ids(raw, generation or {}),
                sliding_window=_sliding_window(raw),
            )
        except KeyError as error:
            raise UnsupportedModelError(f"config.json has no {error.args[0]!r}") from error
        if config.num_heads % config.num_kv_heads:
            raise UnsupportedModelError(
                f"{config.num_heads} heads cannot share {config.num_kv_heads} key-value heads"
            )
        return config


def _refuse_what_cannot_run(raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for settings that would silently give other text."""
    if raw.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise UnsupportedModelError(f"activation {raw['hidden_act']!r}; only silu is computed")
    if raw.get("mlp_bias"):
        raise UnsupportedModelError("biases in the feed-forward layers (mlp_bias)")
    if raw.get("quantization_config"):
        raise UnsupportedModelError("quantised checkpoints (quantization_config)")
    unknown = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"layers of the kind {', '.join(sorted(unknown))}")


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    layer_types = raw.get("layer_types")
    if layer_types:
        return int(raw["sliding_window"]) if "sliding_attention" in layer_types else None
    # Qwen checkpoints carry a width that counts only where use_sliding_window says so.
    width = raw.get("sliding_window")
    return int(width) if width is not None and raw.get("use_sliding_window", True) else None


def rope_config(raw: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings from ``rope_parameters`` (new files) or ``rope_scaling`` (old ones).

    Raises:
        UnsupportedModelError: the positions are scaled in a way that is not computed.
    """
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    partial = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedModelError("rotary positions on a part of each head")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(scaling["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_positions=int(scaling["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return _yarn(scaling, theta)
    raise UnsupportedModelError(
        f"rotary scaling {kind!r}; known are default, linear, llama3 and yarn"
    )


def _yarn(scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    if not scaling.get("truncate", True) or scaling.get("mscale"):
        raise UnsupportedModelError("yarn with mscale or without truncate")
    factor = float(scaling["factor"])
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_positions=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        amplitude=float(amplitude),
    )


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        found.extend(int(token_id) for token_id in ids if token_id not in found)
    return tuple(found)

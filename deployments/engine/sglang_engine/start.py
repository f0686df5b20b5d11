"""Starts SGLang for a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from deployments.engine.errors import WeightsMissingError
from deployments.engine.sglang_engine.draft_link import DraftLink
from deployments.engine.sglang_engine.engine import SGLangEngine
from deployments.engine.sglang_engine.runtime import SGLangRuntime
from deployments.engine.sglang_engine.self_check import installed_version
from deployments.engine.sglang_engine.tier_link import TierSettings, check_codec
from deployments.engine.torch_engine.weights.folders import max_positions
from deployments.engine.validation import ModelLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from deployments.engine.config import EngineConfig
    from deployments.engine.span_export import SpanExport
    from deployments.engine.speculation.speculator import Speculator
    from kv_store.config import KVStoreConfig


def start_sglang_engine(
    config: EngineConfig,
    folder: Path,
    *,
    detokenize: Callable[[Sequence[int]], str],
    speculator: Speculator,
    kv: KVStoreConfig | None = None,
    model_digest: Callable[[], str] | None = None,
    spans: SpanExport | None = None,
) -> SGLangEngine:
    """Load the model; takes from seconds to minutes, blocks.

    Args:
        config: the engine's settings.
        folder: the model's files.
        detokenize: text of output tokens.
        speculator: shut down with the engine; a ``DraftLink`` where drafts are to be verified.
        kv: where pages are shared; None keeps them in this replica.
        model_digest: of the model's files; needed with ``kv``.
        spans: where SGLang's processes send theirs; None for nowhere.

    Raises:
        WeightsMissingError: the folder holds no weights that SGLang reads.
        EngineSetupError: SGLang is missing, is not the one that is known, or does not start.
    """
    max_model_len = config.context_length(_max_positions(folder))
    address = speculator.address if isinstance(speculator, DraftLink) else None
    tier = None
    if kv is not None and model_digest is not None:
        tier = _tier_settings(config, kv, model_digest)
    runtime = SGLangRuntime(
        config, folder, max_model_len, draft_address=address, tier=tier, spans=spans
    )
    if not runtime.is_drafted:
        speculator.shutdown()
    limits = ModelLimits(
        vocab_size=runtime.vocab_size,
        max_model_len=min(max_model_len, runtime.max_request_tokens),
        eos_token_ids=runtime.eos_token_ids,
    )
    return SGLangEngine(runtime, limits, detokenize=detokenize, speculator=speculator)


def _tier_settings(
    config: EngineConfig, kv: KVStoreConfig, model_digest: Callable[[], str]
) -> TierSettings:
    """What SGLang needs to share pages."""
    check_codec(kv)
    deciding = {
        "version": installed_version(),
        "device": config.device,
        "dtype": config.dtype,
        "attention_backend": config.sglang.attention_backend,
        "extra_args": config.sglang.extra_args,
    }
    return TierSettings(
        kv=kv,
        model_digest=model_digest(),
        arithmetic=json.dumps(deciding, sort_keys=True),
        load_timeout_s=config.kv_load_timeout_s,
    )


def _max_positions(folder: Path) -> int:
    length = max_positions(folder)
    if not any(folder.glob("*.safetensors")):
        raise WeightsMissingError(
            f"{folder} has no *.safetensors; SGLang cannot run the built-in model's GGUF file"
        )
    return length

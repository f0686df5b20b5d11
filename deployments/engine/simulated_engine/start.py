"""Starts a simulated engine: the embedded engine's thread and streams around a simulated core."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from deployments.engine.errors import RequestRejectedError
from deployments.engine.simulated_engine.core import SimulatedCore
from deployments.engine.simulated_engine.text import read_text
from deployments.engine.torch_engine.engine import TorchEngine
from deployments.engine.torch_engine.kv_transfer import KVTransfer
from deployments.engine.torch_engine.mailbox import Mailbox
from deployments.engine.torch_engine.page_pool import PagePool
from deployments.engine.torch_engine.scheduler import Scheduler
from deployments.engine.torch_engine.structure.compiler import StructureCompiler
from deployments.engine.torch_engine.weights.folders import max_positions
from deployments.engine.validation import ModelLimits
from kv_store.layout import PageLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.config import EngineConfig
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.types import GenerationRequest
    from kv_store.page_store import PageStore

logger = logging.getLogger(__name__)

_HEAD_DIM = 2
"""Pages are as small as can be: what it costs to move real ones is not simulated."""


class SimulatedEngine(TorchEngine):
    """Refuses what needs a model; everything else is the embedded engine's."""

    def _refuse_if_impossible(self, request: GenerationRequest) -> None:
        super()._refuse_if_impossible(request)
        sampling = request.sampling
        needs_model = {
            "logprobs": sampling.num_logprobs is not None,
            "prompt_logprobs": sampling.num_prompt_logprobs is not None,
            "response_format": sampling.structure is not None,
            "logit_bias": bool(sampling.logit_bias),
            "bad_words": bool(sampling.bad_token_sequences),
            "capture": request.capture is not None,
        }
        for param, is_asked in needs_model.items():
            if is_asked:
                raise RequestRejectedError(
                    f"A simulated engine has no model, hence no {param}.", param
                )


class _Pages:
    """The bytes of pages: none differs from another."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def read_page(self, page: int) -> NDArray[np.uint8]:
        del page
        raw: NDArray[np.uint8] = torch.zeros(self._num_bytes, dtype=torch.uint8).numpy()
        return raw

    def page_rows(self, page: int) -> None:
        """There is no memory."""

    def write_page(self, page: int, raw: NDArray[np.uint8]) -> None:
        """There is nowhere to write to."""

    def copy_rows(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """There are no rows."""


class _NoModel:
    """Stands where the base class keeps a model, which the simulated core never calls."""

    def forward(self, batch: object) -> Tensor:
        raise NotImplementedError

    def forward_with_features(self, batch: object, capture_layers: tuple[int, ...]) -> object:
        raise NotImplementedError


def start_simulated_engine(
    config: EngineConfig,
    folder: Path,
    *,
    page_store_factory: Callable[[PageLayout], PageStore] | None,
    speculator: Speculator,
    detokenize: Callable[[Sequence[int]], str],
    sleep: Callable[[float], None] = time.sleep,
) -> SimulatedEngine:
    """Start the engine thread; reads the model's ``config.json`` and none of its weights.

    Args:
        config: sizes, budgets and simulated times.
        folder: of the model that is simulated.
        page_store_factory: makes the KV tier; its pages have real keys and a few zero bytes.
        speculator: where drafts come from; shut down with the engine.
        detokenize: text of output tokens, for stop strings.
        sleep: lets a step's time pass, on the engine thread.

    Raises:
        WeightsMissingError: there is no ``config.json``.
        UnsupportedModelError: ``config.json`` lacks the vocabulary's or the context's size.
    """
    logger.warning("this engine is simulated: what it writes has no sense")
    text = read_text(folder)
    limits = ModelLimits(
        vocab_size=text.vocab_size,
        max_model_len=config.context_length(max_positions(folder)),
        eos_token_ids=text.eos_token_ids,
    )
    layout = PageLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=_HEAD_DIM,
        dtype="float32",
        model_digest=f"simulated {config.model}",
        rope="none",
        engine="simulated",
    )
    store = page_store_factory(layout) if page_store_factory is not None else None
    mailbox = Mailbox(config.max_waiting + config.max_num_seqs)
    pool = PagePool(config.num_pages)
    speculation = config.speculation
    memory = _Pages(layout.nbytes)
    core = SimulatedCore(
        simulated=config.simulated,
        text=text,
        sleep=sleep,
        runner=_NoModel(),
        memory=memory,
        pool=pool,
        scheduler=Scheduler(
            pool,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_waiting=config.max_waiting,
            num_draft_tokens=speculation.num_draft_tokens if speculation.enabled else 0,
        ),
        transfer=KVTransfer(
            pool,
            memory,
            layout,
            store,
            load_timeout_s=config.kv_load_timeout_s,
            monotonic=time.monotonic,
            wake=mailbox.wake,
        ),
        speculator=speculator,
        head=None,
        limits=limits,
        detokenize=detokenize,
        device=torch.device("cpu"),
    )
    structures = StructureCompiler(
        None, vocab_size=text.vocab_size, eos_token_ids=text.eos_token_ids
    )
    return SimulatedEngine(core, mailbox, limits, speculator, store, structures)

"""What each page codec costs in meaning: the model goes on from KV that went through it.

A prompt's pages are packed and unpacked as the tier does it; the text behind the prompt is then
read over them, token by token as given, and each token's distribution is compared with the one over
untouched pages. Everything else is the same arithmetic, so that only the codec is measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from kv_store.calibration import Calibration, CodecMeasurement
from kv_store.codecs.registry import load_codec
from kv_store.keys import Namespace
from kv_store.layout import PAGE_TOKENS
from kv_store.page_format import decode_page, encode_page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from kv_store.codecs.base import Codec
    from kv_store.layout import PageLayout

_CHUNK_TOKENS = 512
_SPEED_ROUNDS = 3


class _Loss(NamedTuple):
    ratio: float
    encode: float
    decode: float
    kl: float
    top1: float
    perplexity: float
    perplexity_untouched: float


def calibrate_codecs(
    loaded: LoadedModel,
    model_name: str,
    texts: Mapping[str, Sequence[int]],
    codec_names: Sequence[str],
    *,
    num_continued: int,
    progress: Callable[[str], None],
) -> Calibration:
    """Measure codecs on a model; some seconds a text for small models.

    Args:
        loaded: the model.
        model_name: for the record.
        texts: token ids by name; all but the last ``num_continued`` are the prompt, of which full
            pages go through the codec.
        codec_names: as configurations name them.
        num_continued: tokens whose distributions are compared.
        progress: gets a short line from time to time.

    Raises:
        ValueError: a text has no full page before the tokens to compare, or there is no such codec.
    """
    layout = loaded.page_layout()
    codecs = {name: load_codec(name) for name in codec_names}
    losses: dict[str, list[_Loss]] = {name: [] for name in codecs}
    for text, ids in texts.items():
        num_pages = (len(ids) - num_continued) // PAGE_TOKENS
        if num_pages < 1:
            raise ValueError(f"the text {text} has {len(ids)} tokens, too few to measure on")
        reader = _Reader(loaded, list(ids), num_pages * PAGE_TOKENS)
        progress(f"{text}: reading {reader.num_prompt} tokens")
        untouched = reader.read_prompt()
        wanted = reader.continued()
        for name, codec in codecs.items():
            progress(f"{text}: {name}")
            decoded, ratio, encode, decode = _through(codec, untouched, layout, ids)
            got = reader.continued(decoded)
            losses[name].append(
                _Loss(ratio, encode, decode, *_compare(wanted, got, reader.targets))
            )
    return Calibration(
        fingerprint=layout.fingerprint.hex(),
        model=model_name,
        dtype=layout.dtype,
        num_tokens=len(texts) * (num_continued - 1),
        codecs=tuple(_summary(name, rows) for name, rows in losses.items()),
    )


class _Reader:
    """One text in a cache of its own."""

    def __init__(self, loaded: LoadedModel, ids: list[int], num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self._ids = torch.tensor(ids)
        self._cache = KVCache(
            loaded.config,
            -(-len(ids) // PAGE_TOKENS),
            dtype=loaded.model.dtype,
            device=loaded.model.device,
        )
        self._runner = ModelRunner(loaded.model, loaded.config, self._cache)

    @property
    def targets(self) -> Tensor:
        """What the text says behind each compared token but the last."""
        return self._ids[self.num_prompt + 1 :]

    def read_prompt(self) -> list[NDArray[np.uint8]]:
        """Compute the prompt; its pages."""
        for start in range(0, self.num_prompt, _CHUNK_TOKENS):
            end = min(start + _CHUNK_TOKENS, self.num_prompt)
            self._forward(start, end, torch.tensor([end - start - 1]))
        return [self._cache.read_page(page) for page in range(self.num_prompt // PAGE_TOKENS)]

    def continued(self, pages: Sequence[NDArray[np.uint8]] = ()) -> Tensor:
        """[compared, V] log probabilities behind these pages, or those that are there, float64."""
        for page, raw in enumerate(pages):
            self._cache.write_page(page, raw)
        start, end = self.num_prompt, len(self._ids) - 1
        logits = self._forward(start, end, torch.arange(end - start))
        return logits.cpu().double().log_softmax(-1)

    def _forward(self, start: int, end: int, logit_rows: Tensor) -> Tensor:
        slots = torch.arange(end)
        return self._runner.forward(
            ForwardBatch(
                token_ids=self._ids[start:end],
                positions=slots[start:],
                slots=slots[start:],
                spans=(SequenceSpan(start=0, length=end - start, kv_slots=slots),),
                logit_rows=logit_rows,
            )
        )


def _through(
    codec: Codec, pages: Sequence[NDArray[np.uint8]], layout: PageLayout, ids: Sequence[int]
) -> tuple[list[NDArray[np.uint8]], float, float, float]:
    """The pages after the codec, how many times smaller they were, and GB a CPU second each way."""
    keys = Namespace(bytes(32), layout, codec.fidelity).chain(list(ids[: len(pages) * PAGE_TOKENS]))
    out = [np.empty_like(page) for page in pages]
    encode_s: list[float] = []
    decode_s: list[float] = []
    blobs: list[memoryview] = []
    for _ in range(_SPEED_ROUNDS):  # the first one compiles
        started = time.thread_time()
        blobs = [
            encode_page(key, page, layout, codec, created_ms=0)
            for key, page in zip(keys, pages, strict=True)
        ]
        packed = time.thread_time()
        for key, blob, target in zip(keys, blobs, out, strict=True):
            decode_page(blob, key, layout, {codec.codec_id: codec}, target)
        encode_s.append(packed - started)
        decode_s.append(time.thread_time() - packed)
    num_bytes = len(pages) * layout.nbytes
    ratio = num_bytes / sum(map(len, blobs))
    return out, ratio, num_bytes / min(encode_s) / 1e9, num_bytes / min(decode_s) / 1e9


def _compare(wanted: Tensor, got: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    """KL, share of equal likeliest tokens, and both perplexities."""
    kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
    top1 = (wanted.argmax(-1) == got.argmax(-1)).double().mean()
    perplexities = [float(-rows.gather(1, targets[:, None]).mean()) for rows in (got, wanted)]
    return max(0.0, float(kl)), float(top1), *np.exp(perplexities).tolist()


def _summary(name: str, rows: Sequence[_Loss]) -> CodecMeasurement:
    worst = max(rows, key=lambda row: row.kl)
    return CodecMeasurement(
        codec=name,
        ratio=min(row.ratio for row in rows),
        encode_gb_per_cpu_s=float(np.mean([row.encode for row in rows])),
        decode_gb_per_cpu_s=float(np.mean([row.decode for row in rows])),
        kl=worst.kl,
        top1=min(row.top1 for row in rows),
        perplexity=worst.perplexity,
        perplexity_untouched=worst.perplexity_untouched,
    )

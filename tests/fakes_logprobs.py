"""Log probabilities of the fake model, from scratch and in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.fakes_engine import logits_after

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.types import GenerationRequest, TokenLogprob


def logprobs_after(token_ids: Sequence[int]) -> np.ndarray:
    """[V] float64, the log-softmax of what the fake model says behind a text."""
    logits = logits_after(token_ids).astype(np.float64)
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def assert_logprob(entry: TokenLogprob, text: Sequence[int], token_id: int, num_top: int) -> None:
    """Fail unless ``entry`` is what the fake model thinks of ``token_id`` behind ``text``."""
    want = logprobs_after(text)
    assert entry.token_id == token_id
    assert entry.logprob == pytest.approx(want[token_id], abs=1e-9)
    assert entry.rank == 1 + int((want > want[token_id]).sum())
    best = np.sort(want)[::-1][:num_top]
    assert [logprob for _, logprob in entry.top] == pytest.approx(best.tolist(), abs=1e-9)
    assert [want[token] for token, _ in entry.top] == pytest.approx(best.tolist(), abs=1e-9)


def assert_logprobs(
    request: GenerationRequest,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    prompt_logprobs: Sequence[TokenLogprob | None] | None,
) -> None:
    """Fail unless a request got exactly the log probabilities it asked for.

    Args:
        request: without resumed output.
        token_ids: delivered output.
        logprobs: delivered with it.
        prompt_logprobs: delivered with its first token.
    """
    sampling, prompt = request.sampling, request.prompt_token_ids
    if sampling.num_logprobs is None:
        assert not logprobs
    else:
        assert len(logprobs) == len(token_ids)
        for index, (token, entry) in enumerate(zip(token_ids, logprobs, strict=True)):
            text = [*prompt, *token_ids[:index]]
            assert_logprob(entry, text, token, sampling.num_logprobs)
    if sampling.num_prompt_logprobs is None:
        assert prompt_logprobs is None
    if prompt_logprobs is None:
        assert sampling.num_prompt_logprobs is None or not token_ids
        return
    assert len(prompt_logprobs) == len(prompt)
    assert prompt_logprobs[0] is None
    for index, entry in enumerate(prompt_logprobs[1:], 1):
        assert entry is not None
        assert_logprob(entry, prompt[:index], prompt[index], sampling.num_prompt_logprobs)

"""An exported EAGLE-3 head drafts in the real SGLang as it does here."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.heads import write_heads
from tests.sglang.eagle import head_in_sglang
from tests.sglang.embedded import by_the_embedded_engine

if TYPE_CHECKING:
    from pathlib import Path

PYTHON = os.environ.get("SGLANG_PYTHON")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="make test-sglang runs it"),
]

QUESTIONS = ["How do I boil an egg?", "Name the planets in order from the sun."]
MAX_TOKENS = 48
NUM_STEPS = 3
MAX_DIFFERENCE = 1e-3
"""Of logits up to 30, in float32."""


def test_chains_logits_and_text_are_the_same(folder: Path, tmp_path: Path) -> None:
    assert PYTHON is not None
    tokenizer = Tokenizer.load(folder)
    requests = [
        GenerationRequest(
            request_id=question,
            prompt_token_ids=tuple(tokenizer.encode_chat([ChatTurn("user", question)])),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=0, temperature=0.0),
        )
        for question in QUESTIONS
    ]
    answers = asyncio.run(by_the_embedded_engine(requests, folder, tokenizer))
    prompts = [request.prompt_token_ids for request in requests]
    texts = [(*prompt, *answer) for prompt, answer in zip(prompts, answers.values(), strict=True)]
    # Fitted to the very texts that it is to draft, so that many of its tokens are accepted.
    head = tmp_path / "head"
    write_heads(default_cache_dir(), texts, tmp_path / "random", head)
    found = head_in_sglang(
        PYTHON,
        folder,
        head,
        prompts,
        max_tokens=MAX_TOKENS,
        num_steps=NUM_STEPS,
        scratch=tmp_path / "sglang",
    )
    print(found)  # noqa: T201 - figures for whoever runs it
    assert found.num_tokens == sum(map(len, answers.values()))
    assert found.num_other_tokens == 0
    assert all(found.num_rows)
    assert found.largest_difference < MAX_DIFFERENCE < found.largest_logit / 1000
    assert found.num_rounds == found.num_own_rounds
    assert found.num_tokens > 1.5 * found.num_rounds

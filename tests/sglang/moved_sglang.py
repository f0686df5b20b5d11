"""Serves with a SGLang that lacks something remote drafting needs; run with SGLang's Python."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

from pydantic import SecretStr

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.sglang_engine.start import start_sglang_engine
from deployments.engine.speculation.handshake import Identity
from deployments.engine.types import GenerationRequest, SamplingParams


def main(folder: Path) -> None:
    """Generate a few tokens of a text that repeats itself, and print what was drafted."""
    logging.basicConfig(level=logging.INFO)
    from sglang.srt.speculative.spec_utils import GrammarTree

    del GrammarTree.from_host
    identity = Identity(model="smollm2", vocab_size=49152, vocab_digest="")
    link = DraftLink(DraftSettings(SpeculationConfig(), identity, "r", SecretStr("s")), print)
    config = EngineConfig(
        kind="sglang",
        model=str(folder),
        max_model_len=512,
        num_pages=16,
        num_threads=1,
        sglang={"attention_backend": "torch_native"},
    )
    engine = start_sglang_engine(config, folder, detokenize=lambda _: "", speculator=link)
    sampling = SamplingParams(max_tokens=6, seed=0, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(request_id="r", prompt_token_ids=(7, 8, 9) * 5, sampling=sampling)

    async def run() -> dict[str, int]:
        try:
            deltas = [delta async for delta in engine.generate(request)]
        finally:
            await engine.close()
        assert deltas[-1].speculation is not None
        return {
            "num_tokens": sum(len(delta.token_ids) for delta in deltas),
            "num_draft_tokens": deltas[-1].speculation.num_draft_tokens,
        }

    print(json.dumps(asyncio.run(run())))  # noqa: T201 - read by the test


if __name__ == "__main__":
    main(Path(sys.argv[1]))

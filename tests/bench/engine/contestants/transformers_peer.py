"""Hugging Face transformers: ``python -m ... <model folder> <dtype> <threads>``."""

from __future__ import annotations

import sys
import time

import torch
import transformers

from tests.bench.engine.protocol import serve


class Transformers:
    """A plain greedy loop over the model's own cache: ``generate`` without its checks."""

    def __init__(self, folder: str, dtype: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        self.version = transformers.__version__

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float]:
        """See ``protocol.Contestant``."""
        started = time.perf_counter()
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(num_new_tokens - 1):
            tokens = output.logits[:, -1].argmax(dim=1, keepdim=True)
            output = self._model(tokens, past_key_values=output.past_key_values)
        return first - started, (time.perf_counter() - first) / (num_new_tokens - 1)

    @torch.inference_mode()
    def forward(self, context: int, num_tokens: int) -> float:
        """See ``protocol.Contestant``."""
        past = self._model(torch.arange(context).unsqueeze(0), logits_to_keep=1).past_key_values
        tokens = torch.arange(num_tokens).unsqueeze(0)
        started = time.perf_counter()
        self._model(tokens, past_key_values=past)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(lambda: Transformers(sys.argv[1], sys.argv[2], int(sys.argv[3])))

"""vLLM for CPUs: ``python -m ... <model folder> <dtype> <eager or compiled>``.

The engine runs in this process: with two cores, a second process for it would only take time from
the arithmetic. Prefix caching is off, as no prompt comes twice. There is no tokenizer on either
side of the comparison.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import vllm
from vllm import LLM, SamplingParams

from tests.bench.engine.contestants.stepping import SteppedEngine
from tests.bench.engine.protocol import (
    KV_TOKENS,
    MAX_BATCH_TOKENS,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    Block,
    serve,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_KV_BYTES = {"bfloat16": 23_040 * KV_TOKENS, "float32": 46_080 * KV_TOKENS}


class VLLM(SteppedEngine):
    """The synchronous engine."""

    def __init__(self, folder: str, dtype: str, mode: str) -> None:
        super().__init__()
        self._engine = LLM(
            model=folder,
            dtype=dtype,
            enforce_eager=mode == "eager",
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_BATCH_TOKENS,
            kv_cache_memory_bytes=_KV_BYTES[dtype],
            seed=1,
        ).llm_engine
        self.version = vllm.__version__

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        """See ``SteppedEngine``."""
        sampling = SamplingParams(
            temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)

    def step(self) -> Iterable[int]:
        """See ``SteppedEngine``."""
        return [int(output.request_id) for output in self._engine.step()]

    def is_busy(self) -> bool:
        """See ``SteppedEngine``."""
        return bool(self._engine.has_unfinished_requests())

    def kv_blocks(self) -> list[Block]:
        """See ``protocol.Contestant``."""
        worker = self._engine.model_executor.driver_worker.worker
        storages = {
            pool.untyped_storage().data_ptr(): pool.untyped_storage().nbytes()
            for pool in worker.model_runner.kv_caches
        }
        return [Block(*each) for each in storages.items()]


if __name__ == "__main__":
    serve(lambda: VLLM(*sys.argv[1:]))

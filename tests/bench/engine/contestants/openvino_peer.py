"""OpenVINO GenAI on the same GGUF file: ``python -m ... <gguf file> <threads>``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import openvino
import openvino_genai

from tests.bench.engine.contestants.stepping import SteppedEngine
from tests.bench.engine.protocol import MAX_BATCH_TOKENS, MAX_NUM_SEQS, serve

if TYPE_CHECKING:
    from collections.abc import Iterable


class OpenVINO(SteppedEngine):
    """Its pipeline with continuous batching."""

    def __init__(self, gguf_file: str, num_threads: int) -> None:
        super().__init__()
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = 1  # GB
        scheduling.max_num_seqs = MAX_NUM_SEQS
        scheduling.max_num_batched_tokens = MAX_BATCH_TOKENS
        scheduling.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            gguf_file, scheduling, "CPU", {"INFERENCE_NUM_THREADS": num_threads}
        )
        self._handles: dict[int, openvino_genai.GenerationHandle] = {}
        self.version = openvino_genai.__version__

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        """See ``SteppedEngine``."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[number] = self._pipeline.add_request(number, ids, config)

    def step(self) -> Iterable[int]:
        """See ``SteppedEngine``."""
        self._pipeline.step()
        begun = [number for number, handle in self._handles.items() if handle.can_read()]
        for number in begun:
            self._handles[number].read()
        if not self.is_busy():
            self._handles.clear()  # dropping one earlier would cancel its request
        return begun

    def is_busy(self) -> bool:
        """See ``SteppedEngine``."""
        return bool(self._pipeline.has_non_finished_requests())


if __name__ == "__main__":
    serve(lambda: OpenVINO(sys.argv[1], int(sys.argv[2])))

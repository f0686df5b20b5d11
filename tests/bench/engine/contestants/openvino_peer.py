"""OpenVINO GenAI on the same GGUF file: ``python -m ... <gguf file> <threads>``."""

from __future__ import annotations

import sys

import numpy as np
import openvino
import openvino_genai

from tests.bench.engine.protocol import serve


class OpenVINO:
    """Its pipeline keeps one sequence, so it answers batches of one only."""

    def __init__(self, gguf_file: str, num_threads: int) -> None:
        self._pipeline = openvino_genai.LLMPipeline(
            gguf_file, "CPU", INFERENCE_NUM_THREADS=num_threads
        )
        self.version = openvino_genai.__version__

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float] | None:
        """See ``protocol.Contestant``."""
        if len(prompts) > 1:
            return None
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_new_tokens
        config.ignore_eos = True
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        metrics = self._pipeline.generate(inputs, config).perf_metrics
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3


if __name__ == "__main__":
    serve(lambda: OpenVINO(sys.argv[1], int(sys.argv[2])))

"""Compiles the layers in a process that ends, so that no replica carries the compiler around.

LLVM keeps about 150 MB for as long as its process lives. The machine code depends on the dtype of
the KV pool alone, so a model of a few numbers is enough to have it made:
``python -m deployments.engine.torch_engine.compile_ahead bfloat16``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys

import torch

from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kernels.compiling import code_file, first_call, machine
from deployments.engine.torch_engine.kernels.narrow_forward import NarrowForward
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.models.llama import Model
from deployments.engine.torch_engine.rotary import RopeConfig

logger = logging.getLogger(__name__)

_TIMEOUT_S = 600.0
_SMALLEST = ModelConfig(
    model_type="llama",
    hidden_size=32,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=32,
    vocab_size=32,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_positions=64,
)


def compile_ahead(dtype: torch.dtype) -> None:
    """Have another process compile what forwards over a pool of this dtype need, if none has.

    If that fails, the first forward compiles in this process.
    """
    name = str(dtype).removeprefix("torch.")
    done = code_file(_mark(name))
    if done is None or done.exists():
        return
    command = [sys.executable, "-m", __spec__.name, name]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        subprocess.run(  # noqa: S603 - this interpreter, no shell
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        logger.warning("compiling ahead failed: %s %s", error, said[-500:].decode(errors="replace"))


def first_batch() -> ForwardBatch:
    """One token, which is written to slot 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    span = SequenceSpan(start=0, length=1, kv_slots=zero)
    return ForwardBatch(token_ids=zero, positions=zero, slots=zero, spans=(span,), logit_rows=zero)


def _mark(name: str) -> str:
    processor = hashlib.blake2b(machine().encode(), digest_size=8).hexdigest()
    return f"compiled-{name}-{processor}"


def _main(name: str) -> None:
    torch.set_num_threads(1)
    dtype: torch.dtype = getattr(torch, name)
    model = Model(_SMALLEST, dtype=dtype)
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    memory = KVCache(_SMALLEST, 1, dtype=dtype)
    with first_call(), torch.inference_mode():
        NarrowForward(model, memory, 1, 1).forward(first_batch())
    if (done := code_file(_mark(name))) is not None:
        done.touch()


if __name__ == "__main__":
    _main(sys.argv[1])

"""A draft replica without a cluster, in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import SecretStr

from deployments.config import DraftPoolConfig
from deployments.drafters import build_drafter
from deployments.engine.config import TorchEngineConfig
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.handshake import Identity
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.model_files import model_folder, served_model_name
from deployments.tokenizer import Tokenizer
from tests.bench.split.clock import PacedDrafter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.engine.speculation.drafters.base import Drafter

SECRET = SecretStr("bench-split")


def identity(engine: TorchEngineConfig, tokenizer: Tokenizer) -> Identity:
    """What both ends of the stream are."""
    return Identity(
        model=served_model_name(engine),
        vocab_size=tokenizer.vocab_size,
        vocab_digest=tokenizer.vocab_digest(),
    )


def hosted(name: str, num_threads: int) -> Drafter:
    """The drafter of the pool; ``name`` as in ``draft.drafter``."""
    draft = DraftPoolConfig(drafter=name, num_threads=num_threads)
    return build_drafter(draft, TorchEngineConfig(), default_cache_dir())


@contextmanager
def draft_pool(drafter: str, forward_s: float = 0.0) -> Iterator[str]:
    """Run a draft replica, as long as this lasts, at the endpoint that is given."""
    command = [sys.executable, "-m", "tests.bench.split.pool", "--drafter", drafter]
    command += ["--threads", "1", "--forward-seconds", str(forward_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the draft pool ended with status {process.wait()}")
        yield f"127.0.0.1:{int(line)}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Print the port, and serve a drafter until stdin ends.

    Each line of stdin names one that takes over; an empty line says that it has.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--forward-seconds", type=float, default=0.0)
    told = parser.parse_args()
    engine = TorchEngineConfig()
    tokenizer = Tokenizer.load(model_folder(engine.model, default_cache_dir()))
    drafter = hosted(told.drafter, told.threads)
    if told.forward_seconds:
        drafter = PacedDrafter(drafter, told.forward_seconds)
    server = DraftServer(drafter, identity(engine, tokenizer), SECRET)
    sys.stdout.write(f"{server.start()}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        server.replace_drafter(hosted(line.strip(), told.threads))
        sys.stdout.write("\n")
        sys.stdout.flush()
    server.close()


if __name__ == "__main__":
    main()

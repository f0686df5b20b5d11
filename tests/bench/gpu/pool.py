"""A draft replica without a cluster, for any target; in a process of its own, with our Python."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from deployments.config import DraftPoolConfig
from deployments.drafters import build_drafter
from deployments.engine.config import TorchEngineConfig
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.model_files import model_folder
from deployments.tokenizer import Tokenizer
from tests.bench.split.pool import SECRET, identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.engine.speculation.handshake import Identity


def target_identity(model: str) -> Identity:
    """What both ends of the stream are.

    Args:
        model: as in ``engine.model``.
    """
    engine = TorchEngineConfig(model=model)
    tokenizer = Tokenizer.load(model_folder(model, default_cache_dir()))
    return identity(engine, tokenizer)


@contextmanager
def pool(model: str, drafter: dict[str, Any]) -> Iterator[str]:
    """Run a draft replica as long as this lasts, at the endpoint that is given.

    Args:
        model: the target, as in ``engine.model``.
        drafter: settings of ``draft``.

    Raises:
        RuntimeError: it does not start.
    """
    told = json.dumps({"model": model, "draft": drafter})
    command = [sys.executable, "-m", "tests.bench.gpu.pool", told]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the draft replica ended with status {process.wait()}")
        yield f"127.0.0.1:{int(line)}"
    finally:
        process.kill()
        process.wait()


def main(told: dict[str, Any]) -> None:
    """Print the port and serve until stdin ends."""
    draft = DraftPoolConfig.model_validate(told["draft"])
    engine = TorchEngineConfig(model=told["model"])
    drafter = build_drafter(draft, engine, default_cache_dir())
    secret = SecretStr(SECRET.get_secret_value())
    server = DraftServer(drafter, target_identity(told["model"]), secret)
    sys.stdout.write(f"{server.start()}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

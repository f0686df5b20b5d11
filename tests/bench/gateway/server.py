"""A cluster in a process of its own: ``python -m ... <gateway> <tokenizer folder>``.

Prints its addresses as a line of JSON and ends when its stdin does. A process can serve in one way
only, because Ray Serve reads its switches when it is imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import ClusterConfig, PoolsConfig, ServerConfig
from cluster.local_cluster import LocalCluster
from cluster.serve_app import ServedApp
from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.grpc_servicers import GRPC_SERVICERS
from tests.bench.gateway.bars import DEFAULT, PACELINE
from tests.ray_cluster import ray_serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray import serve

MODEL = "instant"


def _config(folder: Path) -> ClusterConfig:
    return ClusterConfig(
        engine=TorchEngineConfig(
            model=str(folder),
            served_model_name=MODEL,
            speculation=SpeculationConfig(enabled=False),
        ),
        cache_dir=folder,
        kv=None,
        pools=PoolsConfig(draft=None),
        server=ServerConfig(http_port=0, grpc_port=0),
    )


def _app(config: ClusterConfig) -> serve.Application:
    from tests.bench.gateway.instant import instant_app

    return instant_app(config)


@contextmanager
def _paceline(config: ClusterConfig) -> Iterator[dict[str, str]]:
    """As ``paceline serve`` starts it."""
    app = ServedApp(build=_app, grpc_servicer_functions=GRPC_SERVICERS)
    with (
        tempfile.TemporaryDirectory() as state,
        LocalCluster(config, app, state_dir=Path(state), on_progress=_tell) as cluster,
    ):
        yield {"http": cluster.state.http_url, "grpc": cluster.state.grpc_address}


@contextmanager
def _ray_default(config: ClusterConfig) -> Iterator[dict[str, str]]:
    """The same application behind Ray's own proxy, with Ray Serve's switches as they come."""
    with ray_serve(GRPC_SERVICERS, haproxy=False) as ports:
        from ray import serve

        serve.run(_app(config), name=config.app_name)
        yield {"http": f"http://127.0.0.1:{ports.http}", "grpc": f"127.0.0.1:{ports.grpc}"}


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Serve until stdin ends."""
    gateway, folder = sys.argv[1:]
    out = sys.stdout
    sys.stdout = sys.stderr  # Ray prints
    start = {PACELINE: _paceline, DEFAULT: _ray_default}[gateway]
    with start(_config(Path(folder))) as addresses:
        out.write(json.dumps(addresses) + "\n")
        out.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()

"""A cluster whose targets are the real SGLang on this machine's CPU."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.metrics_reader import MetricsSnapshot
from deployments.metrics import TIER_PAGES
from tests.integration.cluster.cluster_process import ClusterProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PYTHON = os.environ.get("SGLANG_PYTHON")
MODEL = "smollm2"
START_TIMEOUT_S = 420


def tier_pages(cluster: ClusterProcess, event: str) -> float:
    """Pages of the KV tier "hot", as all replicas' metrics count them."""
    snapshot = MetricsSnapshot.read(cluster.state.metrics_url)
    return snapshot.total(TIER_PAGES.name, tier="hot", event=event)


@contextmanager
def served(place: Path, folder: Path, engine: dict[str, Any], **settings: Any) -> Iterator[Any]:
    """Serve while the block runs.

    Args:
        place: for the cluster's files; exists.
        folder: the model.
        engine: more of the engine's settings.
        settings: the cluster's other settings.
    """
    all_settings = {
        "server": {"http_port": 0, "grpc_port": 0, "start_timeout_s": START_TIMEOUT_S},
        "engine": {
            "kind": "sglang",
            "model": str(folder),
            "served_model_name": MODEL,
            "max_model_len": 1024,
            "num_pages": 64,
            "max_num_seqs": 4,
            "max_waiting": 16,
            "sglang": {"python": PYTHON, "attention_backend": "torch_native"},
        }
        | engine,
        "kv": None,
    } | settings
    config = place / "config.yaml"
    config.write_text(json.dumps(all_settings))
    process = ClusterProcess(["-m", "cluster", "serve", "--config", str(config)], place / "state")
    try:
        process.wait_for("serving until Ctrl-C", START_TIMEOUT_S)
        yield process
    finally:
        process.kill()

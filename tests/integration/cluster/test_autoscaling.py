"""Pools that grow, shrink and are updated under load, on real Ray Serve and real draft streams."""

import json
import subprocess
import sys

import pytest

from tests.fakes_tokenizer import write_tokenizer
from tests.integration.cluster.cluster_process import ROOT, ClusterProcess
from tests.integration.cluster.scaling_cluster import NUM_TOKENS

pytestmark = pytest.mark.integration


def test_no_request_is_lost_while_pools_grow_are_replaced_and_shrink(tmp_path):
    folder = tmp_path / "simulated"
    write_tokenizer(folder)
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": 262, "max_position_embeddings": 2048, "eos_token_id": [0, 1, 2]})
    )
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integration.cluster.scaling_cluster", str(folder)],
        cwd=ROOT,
        env=ClusterProcess.environment(tmp_path / "state"),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert list(told["outcomes"]) == [f"{NUM_TOKENS} tokens"]
    # Requests that moved to another replica wrote the very same text.
    assert told["num_texts"] == 1
    assert {"requests", "kv_pages"} <= set(told["needs"])
    assert told["directions"]["up"] >= 1
    assert told["directions"]["down"] >= 1

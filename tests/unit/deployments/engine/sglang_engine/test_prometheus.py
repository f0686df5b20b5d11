"""Metrics that another process has written, as SGLang's do."""

from __future__ import annotations

import os
import subprocess
import sys

from prometheus_client import REGISTRY, Counter

from deployments.engine.own_metrics import Sample
from deployments.engine.sglang_engine.prometheus import FOLDER, read_metrics

WRITER = """
from prometheus_client import Counter, Gauge, Histogram
Gauge("sglang:running", "d", ["rank"], multiprocess_mode="mostrecent").labels(rank="0").set(3)
Counter("sglang:tokens", "d").inc(5)
Histogram("sglang:wait", "d", buckets=(1.0, 2.0)).observe(1.5)
Counter("other:tokens", "d").inc(1)
"""


def test_figures_of_all_processes_are_read(tmp_path):
    environment = os.environ | {FOLDER: str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WRITER], env=environment, check=True)
    own = Counter("sglang:own", "d")
    try:
        own.inc(2)
        samples = set(read_metrics(tmp_path))
    finally:
        REGISTRY.unregister(own)
    assert samples == {
        Sample("sglang_running", (("rank", "0"),), 3.0, is_total=False),
        Sample("sglang_tokens_total", (), 10.0, is_total=True),
        Sample("sglang_own_total", (), 2.0, is_total=True),
        Sample("sglang_wait_bucket", (("le", "1.0"),), 0.0, is_total=False),
        Sample("sglang_wait_bucket", (("le", "2.0"),), 2.0, is_total=False),
        Sample("sglang_wait_bucket", (("le", "+Inf"),), 2.0, is_total=False),
        Sample("sglang_wait_count", (), 2.0, is_total=False),
        Sample("sglang_wait_sum", (), 3.0, is_total=False),
    }

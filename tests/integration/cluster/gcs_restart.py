"""A Ray cluster whose control plane keeps its state elsewhere loses that process, and gets another.

``python -m ... FOLDER`` with ``RAY_REDIS_ADDRESS`` and ``REDIS_PASSWORD`` as KubeRay sets them on a
head pod. It ends with 0 if an actor is found by its name afterwards, as it was.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

ANSWER_S = 120.0


def main() -> int:
    # Also of the file in which Ray notes its last cluster's address, for all of this machine.
    os.environ["RAY_TMPDIR"] = sys.argv[1]
    import ray
    from ray.cluster_utils import Cluster

    password = os.environ["REDIS_PASSWORD"]
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 80 << 20,
            "include_dashboard": False,
            "redis_password": password,
        },
    )
    ray.init(address=cluster.address, namespace="here", _redis_password=password)

    @ray.remote(num_cpus=0, name="counter", lifetime="detached")
    class Counter:
        def __init__(self) -> None:
            self._count = 0

        def add(self) -> int:
            self._count += 1
            return self._count

    counter: Any = Counter.remote()
    assert ray.get(counter.add.remote(), timeout=ANSWER_S) == 1
    cluster.head_node.kill_gcs_server()
    # What runs goes on without the control plane.
    assert ray.get(counter.add.remote(), timeout=ANSWER_S) == 2
    cluster.head_node.start_gcs_server()
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            found: Any = ray.get_actor("counter", namespace="here")
            break
        except (ray.exceptions.RayError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    assert ray.get(found.add.remote(), timeout=ANSWER_S) == 3
    ray.shutdown()
    cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

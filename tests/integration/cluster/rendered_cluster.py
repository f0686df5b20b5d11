"""A Ray cluster with the nodes of a rendered chart, and the chart's Serve configuration on it.

As a script (``python -m ... FILE``) it serves until SIGTERM. FILE holds JSON: ``nodes``, each with
``num_cpus`` and ``labels``, the head first; ``serve_config``; ``folder`` for Ray's files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    told = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(told["folder"])
    # Also of the file in which Ray notes its last cluster's address, for all of this machine.
    os.environ["RAY_TMPDIR"] = str(folder)
    from ray.cluster_utils import Cluster

    head, *workers = told["nodes"]
    common = {"object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**common, **head, "include_dashboard": False},
    )
    for worker in workers:
        cluster.add_node(**common, **worker)
    (folder / "address").write_text(cluster.address)
    return deploy(folder, told["serve_config"]).wait()


def deploy(
    folder: Path,
    serve_config: dict[str, Any],
    *arguments: str,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Ray's own command, on the cluster in ``folder``: it hands over what KubeRay does."""
    config = folder / "serve.json"
    config.write_text(json.dumps(serve_config))
    address = (folder / "address").read_text()
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    return subprocess.Popen([*command, "--address", address, *arguments], env=environment)


if __name__ == "__main__":
    sys.exit(main())

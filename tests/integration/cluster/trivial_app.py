"""A real but tiny Serve application, so that life and death of a cluster are tested fast.

As a script (``python -m ... CONFIG [--broken]``) it serves until a signal comes.
"""

import os
import sys
import threading
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.config_loader import load_config
from cluster.errors import ClusterError
from cluster.local_cluster import LocalCluster
from cluster.serve_app import ServedApp
from cluster.signals import StopRequestedError, stop_on_signals

BROKEN = "--broken" in sys.argv


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def build(config: ClusterConfig):
    from fastapi import FastAPI
    from ray import serve

    api = FastAPI()

    @api.get("/where")
    def where() -> dict[str, str | int]:
        return {"cluster": os.environ["PACELINE_CLUSTER_ID"], "pid": os.getpid()}

    @serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
    @serve.ingress(api)
    class Where:
        def __init__(self, broken: bool) -> None:
            if broken:
                raise RuntimeError("the reason it broke")

    return Where.bind(BROKEN)


def main() -> int:
    app = ServedApp(build=build, grpc_servicer_functions=())
    cluster = LocalCluster(load_config(Path(sys.argv[1])), app, on_progress=say)
    try:
        with stop_on_signals(lambda: None), cluster:
            say("READY")
            threading.Event().wait()
    except StopRequestedError:
        say("LEFT", cluster.num_processes_left)
    except ClusterError as error:
        say(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

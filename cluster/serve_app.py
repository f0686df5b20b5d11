"""What a local cluster runs: an application and the gRPC services it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray import serve

    from cluster.config import ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedApp:
    """An application to deploy.

    Attributes:
        build: makes the Serve application; called once Ray runs.
        grpc_servicer_functions: import paths of ``add_..._to_server`` functions.
    """

    build: Callable[[ClusterConfig], serve.Application]
    grpc_servicer_functions: tuple[str, ...]

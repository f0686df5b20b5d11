"""What a cluster runs: an application and the gRPC services it answers.

Nothing here imports Ray, which must see its environment before it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.grpc_servicers import GRPC_SERVICERS

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
        file_import_path: makes the same application from a file with all settings, for clusters
            whose pools scale; None for an application whose pools never do.
    """

    build: Callable[[ClusterConfig], serve.Application]
    grpc_servicer_functions: tuple[str, ...]
    file_import_path: str | None = None


IMPORT_PATH = "cluster.app:build_app"
"""How Ray Serve finds the application."""


def paceline_app() -> ServedApp:
    """The product itself."""

    def build(config: ClusterConfig) -> serve.Application:
        from cluster.app import build_application

        return build_application(config)

    return ServedApp(
        build=build,
        grpc_servicer_functions=GRPC_SERVICERS,
        file_import_path="cluster.app:build_from_file",
    )

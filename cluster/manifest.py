"""A ClusterConfig as Ray Serve's own deployment file, the ``serveConfigV2`` of a RayService."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, SecretStr

from cluster.autoscaling import application_policy
from cluster.config_loader import ENV_PREFIX
from cluster.serve_app import IMPORT_PATH
from deployments.grpc_servicers import GRPC_SERVICERS

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

_EVERYWHERE = "0.0.0.0"  # noqa: S104 - a pod is reached from outside of it


@dataclass(frozen=True, slots=True)
class Manifest:
    """What to deploy, and what must come from elsewhere.

    Attributes:
        serve_config: fits ``ray.serve.schema.ServeDeploySchema``; holds no secret.
        secret_variables: environment variables that the pods need for what was left out.
    """

    serve_config: dict[str, Any]
    secret_variables: tuple[str, ...]

    def to_yaml(self) -> str:
        """The file's text, with the missing secrets named in comments."""
        notes = [f"# every pod needs {name} from a Secret\n" for name in self.secret_variables]
        return "".join(notes) + yaml.safe_dump(self.serve_config, sort_keys=False)


def render(config: ClusterConfig) -> Manifest:
    """Render a config; only what was set is written."""
    secrets: list[str] = []
    arguments = _public(config, (), secrets)
    # Addresses are the file's own business here, and the chart's.
    arguments.pop("server", None)
    application: dict[str, Any] = {
        "name": config.app_name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": arguments,
    }
    if policy := application_policy(config):
        application["autoscaling_policy"] = policy
    serve_config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": _EVERYWHERE, "port": config.server.http_port or 8000},
        "grpc_options": {
            "port": config.server.grpc_port or 9000,
            "grpc_servicer_functions": list(GRPC_SERVICERS),
        },
        "logging_config": serve_logging(config),
        "applications": [application],
    }
    return Manifest(serve_config, tuple(dict.fromkeys(secrets)))


def serve_logging(config: ClusterConfig) -> dict[str, str]:
    """Ray Serve's ``logging_config``."""
    return {"log_level": config.log_level, "encoding": "JSON"}


def _public(value: Any, path: tuple[str, ...], secrets: list[str]) -> Any:  # noqa: ANN401
    """A copy that YAML can hold, without secrets; names the variable that carries each of them.

    A secret inside a list cannot be overridden alone, so the variable is the whole list's, and the
    list is left out.
    """
    if isinstance(value, BaseModel):
        # A discriminator is needed even where it was left to its default.
        value = {
            name: item for name, item in value if name in value.model_fields_set or name == "kind"
        }
    if isinstance(value, dict):
        public = {}
        for key, item in value.items():
            if isinstance(item, SecretStr) or (isinstance(item, tuple | list) and _secret(item)):
                secrets.append(ENV_PREFIX + "__".join((*path, key)).upper())
            else:
                public[key] = _public(item, (*path, key), secrets)
        return public
    if isinstance(value, tuple | list):
        return [_public(item, path, secrets) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _secret(value: Any) -> bool:  # noqa: ANN401 - any part of a dumped config
    if isinstance(value, SecretStr):
        return True
    if isinstance(value, BaseModel):
        return any(_secret(item) for _, item in value)
    return isinstance(value, tuple | list) and any(_secret(item) for item in value)

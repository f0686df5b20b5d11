"""Hands an application to Ray Serve, as code or, where its pools scale, as a config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import blake3
from pydantic import SecretStr

from cluster.autoscaling import application_policy
from cluster.manifest import serve_logging

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.config import ClusterConfig
    from cluster.serve_app import ServedApp


def deploy(app: ServedApp, config: ClusterConfig, run_dir: Path) -> None:
    """Deploy; returns before the replicas run. Replicas that run are replaced where need be.

    Args:
        app: what to deploy.
        config: its settings.
        run_dir: readable by this user alone.
    """
    policy = application_policy(config)
    if policy is None or app.file_import_path is None:
        _deploy_code(app, config)
        return
    from deployments.serve_compat import apply_config

    apply_config(
        [
            {
                "name": config.app_name,
                "route_prefix": "/",
                "import_path": app.file_import_path,
                "args": {"file": str(_written(config, run_dir))},
                "autoscaling_policy": policy,
                "logging_config": serve_logging(config),
            }
        ]
    )


def _deploy_code(app: ServedApp, config: ClusterConfig) -> None:
    from ray import serve

    target = serve.RunTarget(
        app.build(config), name=config.app_name, logging_config=serve_logging(config)
    )
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _written(config: ClusterConfig, run_dir: Path) -> Path:
    """The file of all settings; named by what is in it, for Serve replaces replicas by that."""
    text = json.dumps(config.model_dump(), default=_plain)
    path = run_dir / f"config-{blake3.blake3(text.encode()).hexdigest(length=8)}.json"
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
    return path


def _plain(value: Any) -> str:  # noqa: ANN401 - any leaf of a dumped config
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

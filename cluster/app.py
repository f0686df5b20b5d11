"""Binds the deployments of one cluster: ingress -> target -> draft and prefill.

``build_app`` is what a Serve config file names (``import_path: cluster.app:build_app``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
from pydantic import SecretStr
from ray.serve.config import RequestRouterConfig

from cluster.config import ClusterConfig
from cluster.config_loader import parse_config
from cluster.pools import deployment_options, engine_threads, target_options
from deployments.draft import DraftDeployment
from deployments.ingress import IngressDeployment
from deployments.target import TargetDeployment

if TYPE_CHECKING:
    from ray import serve

    from deployments.config import DraftPoolConfig

logger = logging.getLogger(__name__)

# As a path and not as a class: Serve pickles a class by value, with all of its module.
_ROUTER = "deployments.routing.PrefixAwareRouter"
_REPORT_PERIOD_S = 2.0
"""How often Serve asks a target replica which prefixes it holds."""


def build_app(args: dict[str, Any]) -> serve.Application:
    """Serve's entry point; the arguments are a ClusterConfig's fields.

    Taken as plain settings, because the pod's environment must be merged in before they are
    judged: without its secrets a config with tenants is incomplete.

    Raises:
        ConfigError: settings are wrong.
    """
    return build_application(parse_config(args))


def build_from_file(args: dict[str, Any]) -> serve.Application:
    """Serve's entry point on one machine.

    Args:
        args: ``file``, written by ``cluster.serve_deploy``; the environment is merged into it
            already. Serve logs its arguments, and the file holds secrets.
    """
    settings = Path(args["file"]).read_text(encoding="utf-8")
    return build_application(ClusterConfig.model_validate_json(settings))


def build_application(config: ClusterConfig) -> serve.Application:
    """Bind the deployments of a config."""
    pool = _with_pool_secret(config)
    engine = config.engine.model_copy(update={"num_threads": engine_threads(config)})
    draft = None
    if config.pools.draft is not None and config.engine.takes_drafts:
        draft = DraftDeployment.options(**deployment_options(config.pools.draft)).bind(
            engine=engine,
            draft=pool,
            cache_dir=config.cache_dir,
            tracing=config.tracing,
        )
    router = RequestRouterConfig(
        request_router_class=_ROUTER, request_routing_stats_period_s=_REPORT_PERIOD_S
    )
    target = TargetDeployment.options(**target_options(config), request_router_config=router).bind(
        draft,
        _prefill(config, router),
        engine=engine,
        cache_dir=config.cache_dir,
        kv=config.kv,
        pool_secret=pool.secret,
        tracing=config.tracing,
        prefill_config=config.prefill,
    )
    return IngressDeployment.options(**deployment_options(config.pools.ingress)).bind(
        target,
        engine=engine,
        cache_dir=config.cache_dir,
        config=config.ingress,
        auth=config.auth,
        tracing=config.tracing,
    )


def _prefill(config: ClusterConfig, router: RequestRouterConfig) -> serve.Application | None:
    """The prefill pool: target replicas that are asked for prompts alone, and draft nothing."""
    pool = config.pools.prefill
    if pool is None:
        return None
    engine = config.engine.model_copy(
        update={
            "num_threads": engine_threads(config, pool),
            "speculation": config.engine.speculation.model_copy(update={"enabled": False}),
        }
    )
    options = deployment_options(pool)
    return TargetDeployment.options(name="prefill", **options, request_router_config=router).bind(
        None,
        engine=engine,
        cache_dir=config.cache_dir,
        kv=config.kv,
        pool_secret=SecretStr(""),
        tracing=config.tracing,
        service="paceline-prefill",
    )


def _with_pool_secret(config: ClusterConfig) -> DraftPoolConfig:
    """Give the draft pool a secret if the settings have none.

    Derived and not drawn: Serve replaces every replica whose arguments change, and a config that
    is applied twice must change none.
    """
    if config.draft.secret.get_secret_value():
        return config.draft
    secret = config.auth.cluster_secret.get_secret_value().encode()
    digest = blake3.blake3(secret, derive_key_context="paceline draft pool 1").hexdigest()
    return config.draft.model_copy(update={"secret": SecretStr(digest)})

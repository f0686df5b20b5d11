"""Wrong values are refused before anything reaches a cluster."""

from __future__ import annotations

import copy
import json
from typing import Any

import helm_python as helm
import pytest
import yaml

from cluster.config_loader import parse_config
from tests.chart.config_schema import SCHEMA_PATH, with_config_schema
from tests.chart.conftest import CHART, objects, render

GOOD = yaml.safe_load((CHART / "ci/default-values.yaml").read_text(encoding="utf-8"))
GOOD_TENANT = {"name": "acme", "api_keys": ["a-key-of-acme"]}


def _with(path: str, value: Any) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    at = values
    for name in parents:
        at = at.setdefault(name, {})
    at[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("imagePullPolicy", "Always", "imagePullPolicy"),
        ("image.pullPolicy", "Sometimes", "pullPolicy"),
        ("ray.version", "2.9.0", "version"),
        ("ray.upgradeStrategy", "Recreate", "upgradeStrategy"),
        ("ray.gcsFaultTolerance.address", "gcs-redis", "address"),
        ("ray.gcsFaultTolerance.server.storage", "1 GiB", "storage"),
        ("ray.upgradeStrategy", "NewClusterWithIncrementalUpgrade", "gatewayClassName"),
        ("ray.incrementalUpgrade.stepSizePercent", 0, "stepSizePercent"),
        ("ingress.enabled", True, "Host"),
        ("ingress.httpHost", "https://llm.example", "httpHost"),
        ("gateway.enabled", True, "parentRefs"),
        ("gateway", {"enabled": True, "parentRefs": [{"name": "public"}]}, "Hosts"),
        ("gateway.parentRefs", [{"gateway": "public"}], "gateway"),
        ("gateway.grpcHosts", ["grpc.example:443"], "grpcHosts"),
        ("gateway.httpTimeout", "never", "httpTimeout"),
        ("tls.existingSecret", "Certificates!", "existingSecret"),
        ("tls.surfaces", "yes", "surfaces"),
        ("config.engine.speculation.pool_tls", {"server_name": "mine"}, "pool_tls"),
        ("spreadOver", "zone", "spreadOver"),
        ("podMonitor.interval", "often", "interval"),
        ("dashboards.labels", {"grafana_dashboard": 1}, "grafana_dashboard"),
        ("serve.httpPort", 70000, "httpPort"),
        ("serve.grpcPort", "9000", "grpcPort"),
        ("service.type", "Headless", "type"),
        ("pools.embedding", {}, "embedding"),
        ("pools.target.minPods", -1, "minPods"),
        ("pools.target.maxPods", 0, "maxPods"),
        ("pools.target.resources", {"limits": None}, "limits"),
        ("pools.target.resources.limits.memory", "8 GB", "memory"),
        ("config.engine.speculation.num_draft_tokns", 4, "num_draft_tokns"),
        ("config.engine.speculation.num_draft_tokens", 0, "num_draft_tokens"),
        ("config.engine.dtype", "float16", "dtype"),
        ("config.pools.target.autoscaling.max_replicas", "many", "max_replicas"),
        ("config.pools.target.labels", {"pool": "mine"}, "labels"),
        ("config.server", {"http_port": 1}, "server"),
        ("config.kv.tiers", [{"kind": "memory"}], "tiers"),
        ("config.draft.secret", "in the clear", "secret"),
        ("config.auth", {"cluster_secret": "in the clear"}, "auth"),
        ("valkey.maxMemory", "80%", "maxMemory"),
        ("valkey.shards", 0, "shards"),
        # Two shards have no majority when one is gone.
        ("valkey.shards", 2, "shards"),
        ("valkey.port", 60_000, "port"),
        ("tiers.valkey", {"ttl": 60}, "ttl"),
        ("tiers.valkey", {"url": "redis://elsewhere"}, "url"),
        ("tiers.ssd", {"num_read_threads": 0}, "num_read_threads"),
        ("auth.pageEncryptionKey", "short", "pageEncryptionKey"),
        ("auth.tenants", [{"name": "acme"}], "tenants"),
        ("auth.tenants", [{**GOOD_TENANT, "name": "Not A Name"}], "name"),
        ("auth.tenants", [{**GOOD_TENANT, "api_keys": ["a key of acme"]}], "api_keys"),
        ("auth.tenants", [{**GOOD_TENANT, "api_key_sha256": ["abc"]}], "api_key_sha256"),
        ("auth.clusterSecret", "my secret #1 that is really very long", "clusterSecret"),
        ("auth.valkeyPassword", "would break @ the URL", "valkeyPassword"),
        ("podDisruptionBudget.minAvailable.target", "50%", "target"),
        ("networkPolicy.clients", "everybody", "clients"),
    ],
)
def test_wrong_values_are_refused_by_name(path: str, value: Any, named: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=named):
        render(_with(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("auth.clusterSecret", "short", "at least 32 characters"),
        ("auth.valkeyPassword", "short", "at least 16 characters"),
        ("ray.gcsFaultTolerance.enabled", True, "gcsPassword needs at least 16 characters"),
        ("auth.encryptPages", True, "needs auth.pageEncryptionKey"),
    ],
)
def test_weak_or_missing_secrets_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=message):
        render(_with(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pools.target.minPods", 9, "pools.target.minPods is above its maxPods"),
        ("config.pools.draft.num_gpus", 0.5, "needs a GPU in pools.draft.resources.limits"),
        ("serve.grpcPort", 8000, "must all differ"),
        ("tls", {"existingSecret": "certificates", "httpPort": 9000}, "must all differ"),
        ("ray.gcsFaultTolerance.existingSecret", "mine", "set its address as well"),
        ("externalValkey.existingSecret", "mine", "not used while valkey.enabled"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=message):
        render(_with(path, value))


def test_a_prefill_pool_needs_a_hot_tier() -> None:
    values = _with("config.pools.prefill", {"shutdown_timeout_s": 60})
    kinds = [item["kind"] for item in objects(render(values))]
    assert "RayService" in kinds
    with pytest.raises(helm.HelmRenderError, match="hands pages over through Valkey"):
        render(values | {"valkey": {"enabled": False}})


def test_nothing_has_a_default_secret() -> None:
    with pytest.raises(helm.HelmRenderError, match="clusterSecret"):
        render({})


def test_an_existing_secret_replaces_the_charts() -> None:
    kinds = {item["kind"] for item in objects(render({"auth": {"existingSecret": "mine"}}))}
    assert "Secret" not in kinds


def test_without_shared_pages_there_is_nothing_to_seal() -> None:
    values = _with("config.kv", None)
    values["auth"] |= {"encryptPages": True, "pageEncryptionKey": "0f" * 32}
    with pytest.raises(helm.HelmRenderError, match="nothing to seal"):
        render(values)


def test_a_null_kv_shares_no_pages() -> None:
    (service,) = (
        item for item in objects(render(_with("config.kv", None))) if item["kind"] == "RayService"
    )
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        variables |= {"PACELINE_AUTH__CLUSTER_SECRET": "s" * 32, "PACELINE_AUTH__TENANTS": "[]"}
        assert parse_config(application["args"], variables).kv is None


def test_the_schema_knows_every_setting() -> None:
    """``python -m tests.chart.config_schema`` brings the chart's schema up to date."""
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    assert schema == with_config_schema(schema)


def test_every_object_in_the_schema_is_closed() -> None:
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    opened: list[str] = []

    def visit(at: str, node: Any) -> None:
        if isinstance(node, list):
            for index, child in enumerate(node):
                visit(f"{at}[{index}]", child)
        if not isinstance(node, dict):
            return
        is_object = "properties" in node and node.get("type") == "object"
        if is_object and node.get("additionalProperties") is not False:
            opened.append(at)
        for name, child in node.items():
            visit(f"{at}.{name}", child)

    visit("", schema)
    assert opened == []

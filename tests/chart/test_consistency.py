"""What no schema says: names, ports, labels and times that must agree with each other."""

from __future__ import annotations

import importlib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart.conftest import CHART, CI_VALUES, named_ports, selects

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chart.conftest import Rendering

RAY_COMPONENTS = {"head", "ingress", "target", "prefill", "draft"}
SERVERS = {"valkey", "gcs"}


def _secret_references(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if "secretKeyRef" in value:
            yield value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]
        for child in value.values():
            yield from _secret_references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _secret_references(child)


def test_every_ci_file_says_what_it_is_for() -> None:
    assert {path.name for path in CI_VALUES} >= {
        "default-values.yaml",
        "one-node-values.yaml",
        "8-gpus-values.yaml",
        "64-gpus-values.yaml",
        "external-valkey-values.yaml",
    }
    for path in CI_VALUES:
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_object_names_are_unique_and_short(rendering: Rendering) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in rendering.objects]
    assert len(set(names)) == len(names)
    # KubeRay puts a hash and a service's suffix behind the RayService's name.
    assert len(rendering.ray_service["metadata"]["name"]) <= 40


def test_the_monitor_finds_a_metrics_port_on_every_ray_pod(rendering: Rendering) -> None:
    monitors = rendering.of_kind("PodMonitor")
    assert bool(monitors) == rendering.values["podMonitor"]["enabled"]
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        selected = {
            component: named_ports(template)
            for component, template in rendering.pod_templates()
            if selects(monitor["spec"]["selector"], template["metadata"]["labels"])
        }
        assert selected.keys() == {name for name, _ in rendering.pod_templates()} - SERVERS
        assert all(endpoint["port"] in ports for ports in selected.values())


def test_dashboards_show_metrics_that_exist(rendering: Rendering) -> None:
    # Not at the module's head: it imports Ray Serve, which then reads its switches.
    from deployments.metrics import ALL_METRICS

    boards = [
        json.loads(text)
        for item in rendering.of_kind("ConfigMap")
        for name, text in item["data"].items()
        if name.endswith(".json")
    ]
    assert bool(boards) == rendering.values["dashboards"]["enabled"]
    histograms = {metric.name for metric in ALL_METRICS if metric.boundaries}
    labels = {metric.name: set(metric.labels) for metric in ALL_METRICS}
    for board in boards:
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        for target in (target for panel in panels for target in panel["targets"]):
            shown = set(re.findall(r"ray_(\w+)", target["expr"]))
            assert shown, target["expr"]
            for name in shown - {"serve_deployment_replica_healthy"}:
                metric = name.removesuffix("_bucket")
                assert (metric in histograms) == name.endswith("_bucket"), name
                told = re.findall(r"{{(\w+)}}", target["legendFormat"])
                if f"({name}" in target["expr"] and len(shown) == 1:
                    assert labels[metric] >= set(told), target["expr"]
                assert metric in labels, name


def test_only_an_incremental_upgrade_has_steps(rendering: Rendering) -> None:
    strategy = rendering.ray_service["spec"]["upgradeStrategy"]
    is_incremental = strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert ("clusterUpgradeOptions" in strategy) == is_incremental


def test_serve_listens_where_the_pods_say(rendering: Rendering) -> None:
    config = rendering.serve_config
    for component, template in rendering.pod_templates():
        ports = named_ports(template)
        if component == "head":
            # KubeRay makes its Serve service from the head's port of this name.
            assert ports["serve"] == config["http_options"]["port"]
        elif component in RAY_COMPONENTS:
            assert ports["http"] == config["http_options"]["port"]
            assert ports["grpc"] == config["grpc_options"]["port"]


def test_the_grpc_servicer_can_be_imported(rendering: Rendering) -> None:
    for path in rendering.serve_config["grpc_options"]["grpc_servicer_functions"]:
        module, _, function = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_pool_finds_nodes_with_its_labels(rendering: Rendering) -> None:
    (application,) = rendering.serve_config["applications"]
    pools = {name: pool for name, pool in application["args"]["pools"].items() if pool}
    groups = {group["groupName"]: group for group in rendering.ray_cluster["workerGroupSpecs"]}
    assert set(pools) == set(groups)
    for name, pool in pools.items():
        assert pool["labels"]
        assert pool["labels"].items() <= groups[name]["labels"].items()


def test_a_replica_fits_on_a_pod_of_its_pool(rendering: Rendering) -> None:
    (application,) = rendering.serve_config["applications"]
    for group in rendering.ray_cluster["workerGroupSpecs"]:
        pool = application["args"]["pools"][group["groupName"]]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        # One logical CPU of the pod stays free for Serve's proxy and Ray itself.
        assert pool["num_cpus"] < float(limits["cpu"])
        assert pool.get("num_gpus", 0) <= float(limits.get("nvidia.com/gpu", 0))
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_pods_outlive_the_grace_of_their_replicas(rendering: Rendering) -> None:
    (application,) = rendering.serve_config["applications"]
    for group in rendering.ray_cluster["workerGroupSpecs"]:
        pool = application["args"]["pools"][group["groupName"]]
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= math.ceil(pool["shutdown_timeout_s"]) + 30


def test_serve_flags_are_on_every_ray_pod(rendering: Rendering) -> None:
    haproxy = "1" if rendering.values["serve"]["haproxy"] else "0"
    for component, template in rendering.pod_templates():
        if component not in RAY_COMPONENTS:
            continue
        (container,) = template["spec"]["containers"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == haproxy
        assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert environment["RAY_worker_niceness"] == "0"


def test_kubernetes_adds_no_settings_of_its_own(rendering: Rendering) -> None:
    # A service named paceline would become PACELINE_PORT and be read as a setting.
    for component, template in rendering.pod_templates():
        if component in RAY_COMPONENTS:
            assert template["spec"]["enableServiceLinks"] is False


def test_the_head_runs_no_replica(rendering: Rendering) -> None:
    assert rendering.ray_cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_ray_pods_keep_kuberays_own_labels(rendering: Rendering) -> None:
    for component, template in rendering.pod_templates():
        if component in RAY_COMPONENTS:
            assert "app.kubernetes.io/name" not in template["metadata"]["labels"]


def test_secrets_exist_with_the_keys_that_are_read(rendering: Rendering) -> None:
    values = rendering.values
    made = {
        item["metadata"]["name"]: set(item["stringData"]) for item in rendering.of_kind("Secret")
    }
    given = {
        values["auth"]["existingSecret"]: {
            "cluster-secret",
            "tenants",
            "valkey-password",
            "gcs-password",
            "page-encryption-key",
        },
        values["externalValkey"]["existingSecret"]: {values["externalValkey"]["urlKey"]},
        values["ray"]["gcsFaultTolerance"]["existingSecret"]: {
            values["ray"]["gcsFaultTolerance"]["passwordKey"]
        },
    }
    given.pop("", None)
    references = set(_secret_references(rendering.objects))
    assert references
    for name, key in references:
        assert key in (made | given)[name], (name, key)
    # A Secret nobody reads is a secret for nothing.
    for name, keys in made.items():
        assert {(name, key) for key in keys} <= references


def test_no_secret_is_in_the_clear(rendering: Rendering) -> None:
    auth = rendering.values["auth"]
    secrets = [
        auth[name]
        for name in ("clusterSecret", "valkeyPassword", "gcsPassword", "pageEncryptionKey")
    ]
    secrets += [key for tenant in auth["tenants"] for key in tenant.get("api_keys", [])]
    for path, text in rendering.files.items():
        if not path.endswith("/secret.yaml"):
            assert not [secret for secret in secrets if secret and secret in text], path


def test_the_tenants_secret_is_a_list_of_tenants(rendering: Rendering) -> None:
    for secret in rendering.of_kind("Secret"):
        tenants = yaml.safe_load(secret["stringData"]["tenants"])
        assert [tenant["name"] for tenant in tenants] == [
            tenant["name"] for tenant in rendering.values["auth"]["tenants"]
        ]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == project["version"]


@pytest.mark.parametrize("name", ["README.md", "values.yaml"])
def test_every_top_level_value_is_explained(name: str) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    text = (CHART / name).read_text(encoding="utf-8")
    assert [key for key in values if key not in text] == []


def test_the_image_with_sglang_installs_what_its_page_says() -> None:
    def packages(text: str) -> set[str]:
        joined = text.replace("\\\n", " ")
        commands = re.findall(r"sglang-venv/bin/pip install ([^&\n]*)", joined)
        words = " ".join(commands).split()
        return {word.strip('"') for word in words if not word.startswith("-")}

    page = packages(Path("docs/sglang.md").read_text(encoding="utf-8"))
    assert len(page) > 10
    assert packages(Path("Dockerfile").read_text(encoding="utf-8")) == page

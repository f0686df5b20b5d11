"""Where pages and the control plane's state are kept, and what the pods are told of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from tests.chart.conftest import PAGE_COMPONENTS, containers

if TYPE_CHECKING:
    from tests.chart.conftest import Rendering

BYTES = {"mb": 1 << 20, "gb": 1 << 30, "Mi": 1 << 20, "Gi": 1 << 30}


def test_pages_go_where_the_values_say(rendering: Rendering) -> None:
    (target,) = (spec for name, spec in rendering.pod_templates() if name == "target")
    (container,) = target["spec"]["containers"]
    (value,) = (item["value"] for item in container["env"] if item["name"] == "PACELINE_KV__TIERS")
    tiers = {tier["kind"]: tier for tier in yaml.safe_load(value)}
    values = rendering.values
    assert ("ssd" in tiers) == values["ssd"]["enabled"]
    if values["ssd"]["enabled"]:
        folders = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert tiers["ssd"]["root"] in folders
        assert tiers["ssd"]["budget_bytes"] == values["ssd"]["budgetBytesPerReplica"]
    groups = rendering.ray_cluster["workerGroupSpecs"]
    num_pods = sum(
        group["maxReplicas"] for group in groups if group["groupName"] in PAGE_COMPONENTS
    )
    may_share = values["ssd"]["shared"] and num_pods > 1
    assert ("peers" in tiers) == (may_share and {"ssd", "valkey"} <= tiers.keys())
    if values["valkey"]["enabled"]:
        (service,) = (
            item["metadata"]["name"]
            for item in rendering.of_kind("Service")
            if item["spec"]["selector"]["app.kubernetes.io/component"] == "valkey"
            and "clusterIP" not in item["spec"]
        )
        address = f"$(VALKEY_PASSWORD)@{service}:{values['valkey']['port']}/0"
        has_tls = bool(values["tls"]["existingSecret"]) and values["tls"]["valkey"]
        expected = (
            f"rediss://:{address}?ssl_ca_certs=/etc/paceline/tls/ca.crt"
            if has_tls
            else f"redis://:{address}"
        )
        assert tiers["valkey"]["url"] == expected
        assert tiers["valkey"]["is_cluster"] == (values["valkey"]["shards"] > 1)
    elif values["externalValkey"]["existingSecret"]:
        assert tiers["valkey"]["url"] == "$(VALKEY_URL)"
        assert tiers["valkey"]["is_cluster"] == values["externalValkey"]["isCluster"]
    for kind, settings in values["tiers"].items():
        if kind in tiers:
            assert settings.items() <= tiers[kind].items()
    # Kubernetes replaces $(NAME) only by variables that stand before it.
    names = [item["name"] for item in container["env"]]
    for name in ("VALKEY_PASSWORD", "VALKEY_URL"):
        if f"$({name})" in value:
            assert names.index(name) < names.index("PACELINE_KV__TIERS")


def _bytes(amount: str) -> int:
    found = re.fullmatch(r"([0-9]+)([a-zA-Z]+)", amount)
    assert found
    return int(found[1]) * BYTES[found[2]]


def _server(rendering: Rendering, component: str) -> tuple[dict[str, Any], list[str]] | None:
    """A StatefulSet of the chart and the lines of its settings."""
    for item in rendering.of_kind("StatefulSet"):
        labels = item["spec"]["template"]["metadata"]["labels"]
        if labels["app.kubernetes.io/component"] == component:
            name = f"demo-paceline-{component}"
            (config,) = (
                each for each in rendering.of_kind("ConfigMap") if each["metadata"]["name"] == name
            )
            return item, config["data"]["valkey.conf"].splitlines()
    return None


def test_valkey_evicts_and_forgets(rendering: Rendering) -> None:
    values = rendering.values["valkey"]
    server = _server(rendering, "valkey")
    assert (server is not None) == values["enabled"]
    if server is None:
        return
    stateful_set, lines = server
    assert "maxmemory-policy allkeys-lfu" in lines
    assert 'save ""' in lines
    assert "appendonly no" in lines
    assert stateful_set["spec"]["replicas"] == values["shards"]
    assert ("cluster-enabled yes" in lines) == (values["shards"] > 1)
    assert "volumeClaimTemplates" not in stateful_set["spec"]
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    limit = _bytes(container["resources"]["limits"]["memory"])
    # Valkey needs room above maxmemory for buffers and fragmentation.
    assert limit >= 1.2 * _bytes(values["maxMemory"])


def test_the_control_planes_server_keeps_everything(rendering: Rendering) -> None:
    values = rendering.values["ray"]["gcsFaultTolerance"]
    options = rendering.ray_cluster.get("gcsFaultToleranceOptions")
    assert (options is not None) == values["enabled"]
    server = _server(rendering, "gcs")
    assert (server is not None) == (values["enabled"] and not values["address"])
    if options is None:
        return
    if server is None:
        assert options["redisAddress"] == values["address"]
        return
    stateful_set, lines = server
    assert "maxmemory-policy noeviction" in lines
    assert "appendonly yes" in lines
    (claim,) = stateful_set["spec"]["volumeClaimTemplates"]
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    environment = {entry["name"]: entry for entry in container["env"]}
    assert mounted[claim["metadata"]["name"]] == environment["DATA_DIR"]["value"]
    # The head is told the address and the password of that very server.
    host, _, port = options["redisAddress"].partition(":")
    (service,) = (item for item in rendering.of_kind("Service") if item["metadata"]["name"] == host)
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["port"] == int(port)
    asked = environment["REDISCLI_AUTH"]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == asked


def test_pods_of_a_server_find_each_other(rendering: Rendering) -> None:
    services = {item["metadata"]["name"]: item["spec"] for item in rendering.of_kind("Service")}
    for stateful_set in rendering.of_kind("StatefulSet"):
        spec = stateful_set["spec"]
        nodes = services[spec["serviceName"]]
        assert nodes["clusterIP"] == "None"
        assert nodes["publishNotReadyAddresses"] is True
        assert nodes["selector"] == spec["selector"]["matchLabels"]
        (container,) = spec["template"]["spec"]["containers"]
        told = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert told["NODES_DOMAIN"] == f"{spec['serviceName']}.serving.svc"
        assert told["SHARDS"] == str(spec["replicas"])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert told["PORT"] == str(ports["valkey"])
        assert ports.get("bus", 0) == (ports["valkey"] + 10_000 if spec["replicas"] > 1 else 0)
        # A name may have 63 characters with what Kubernetes puts behind it.
        assert len(stateful_set["metadata"]["name"]) <= 52


def test_the_ssd_tier_has_its_folder(rendering: Rendering) -> None:
    values = rendering.values["ssd"]
    for component, template in rendering.pod_templates():
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        (container,) = template["spec"]["containers"]
        folders = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        expected = component in PAGE_COMPONENTS and values["enabled"]
        assert ("/var/lib/paceline/kv" in folders) == expected
        if not expected:
            continue
        volume = volumes[folders["/var/lib/paceline/kv"]]
        if values["hostPath"]:
            assert volume["hostPath"]["path"] == values["hostPath"]
        elif values["storageClass"]:
            claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
            assert claim["storageClassName"] == values["storageClass"]
            assert claim["resources"]["requests"]["storage"] == values["sizeLimit"]
            assert _bytes(values["sizeLimit"]) > values["budgetBytesPerReplica"]
        else:
            assert volume["emptyDir"]["sizeLimit"] == values["sizeLimit"]


def test_every_volume_is_mounted_and_every_mount_is_a_volume(rendering: Rendering) -> None:
    claims = {
        claim["metadata"]["name"]
        for item in rendering.of_kind("StatefulSet")
        for claim in item["spec"].get("volumeClaimTemplates", [])
    }
    for component, template in rendering.pod_templates():
        spec = template["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        mounted = {
            mount["name"] for container in containers(spec) for mount in container["volumeMounts"]
        }
        assert volumes <= mounted, component
        assert mounted - volumes <= (claims if component == "gcs" else set()), component

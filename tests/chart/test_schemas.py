"""The chart's objects against the schemas of Helm, Kubernetes, KubeRay and Ray Serve."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.config import ClusterConfig, ServerConfig
from cluster.config_loader import parse_config
from cluster.manifest import render
from tests.chart.conftest import CHART, Rendering, containers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KUBERNETES_VERSIONS = ("1.30", "1.37")
OF_OPERATORS = {
    "RayService": ("ray.io", "v1"),
    "PodMonitor": ("monitoring.coreos.com", "v1"),
    "HTTPRoute": ("gateway.networking.k8s.io", "v1"),
    "GRPCRoute": ("gateway.networking.k8s.io", "v1"),
}
"""Kinds that Kubernetes itself does not know."""


def test_lint_finds_nothing(ci_values: dict[str, Any]) -> None:
    report = helm.lint(CHART, ci_values, strict=True)
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []
    findings = [message["error"] for message in report["messages"]]
    assert [text for text in findings if text != "icon is recommended"] == []


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_core_objects_are_valid(rendering: Rendering, version: str) -> None:
    core = [item for item in rendering.objects if item["kind"] not in OF_OPERATORS]
    assert core
    for item in core:
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_ray_pods_are_valid_pods(rendering: Rendering, version: str) -> None:
    for component, template in rendering.pod_templates():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": component, **template["metadata"]},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, version, strict=True)


def test_an_invalid_object_would_be_found(rendering: Rendering) -> None:
    service = copy.deepcopy(rendering.of_kind("Service")[0])
    service["spec"]["portz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, KUBERNETES_VERSIONS[0], strict=True)


def _crd_schema(folder: Path, kind: str) -> dict[str, Any]:
    """The schema of a kind's CRD, made strict."""
    group, wanted = OF_OPERATORS[kind]
    path = folder / f"{group}_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {folder}; --kuberay-crds=FOLDER names another folder")
    with path.open(encoding="utf-8") as stream:
        crd = yaml.load(stream, Loader=yaml.CSafeLoader)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == wanted)
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"x-kubernetes-preserve-unknown-fields": True}
    return _strict(schema)


@pytest.fixture(scope="session")
def crd_schema(pytestconfig: pytest.Config) -> Callable[[str], dict[str, Any]]:
    """The strict schema of each kind of an operator, whose CRD the folder has."""
    folder: Path = pytestconfig.getoption("--kuberay-crds")
    return functools.cache(functools.partial(_crd_schema, folder))


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse unknown fields wherever an API server would drop them in silence."""
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for child in schema.get("properties", {}).values():
        _strict(child)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            _strict(schema[keyword])
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return schema


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """As the API server does before it looks for required fields."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                _with_defaults(value[name], child)
    elif isinstance(value, list):
        for item in value:
            _with_defaults(item, schema.get("items", {}))
    return value


@pytest.mark.parametrize("kind", OF_OPERATORS)
def test_objects_of_operators_fit_their_crds(
    rendering: Rendering, kind: str, crd_schema: Callable[[str], dict[str, Any]]
) -> None:
    schema = crd_schema(kind)
    for item in rendering.of_kind(kind):
        assert item["apiVersion"] == "/".join(OF_OPERATORS[kind])
        jsonschema.validate(_with_defaults(copy.deepcopy(item), schema), schema)


def test_a_misspelt_ray_field_would_be_found(
    rendering: Rendering, crd_schema: Callable[[str], dict[str, Any]]
) -> None:
    schema = crd_schema("RayService")
    service = _with_defaults(copy.deepcopy(rendering.ray_service), schema)
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(service, schema)


def test_serve_accepts_its_config(rendering: Rendering) -> None:
    # Not at the module's head: Ray Serve reads its switches when it is first imported, and local
    # clusters of other tests in this process set them.
    from ray.serve.schema import ServeDeploySchema

    config = rendering.serve_config
    parsed = ServeDeploySchema.model_validate(config)
    # Serve ignores keys it does not know, so nothing may be lost on the way.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    (application,) = parsed.applications
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    assert set(config["http_options"]) <= set(type(parsed.http_options).model_fields)
    assert set(config["grpc_options"]) <= set(type(parsed.grpc_options).model_fields)


ELSEWHERE = {"url": "redis://elsewhere", "page-encryption-key": "0f" * 32}
"""What Secrets hold that the chart does not make."""


def _environment(container: dict[str, Any], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """What a container sees."""
    environment: dict[str, str] = {}
    for entry in container["env"]:
        value = entry.get("value", "")
        if reference := entry.get("valueFrom", {}).get("secretKeyRef"):
            name, key = reference["name"], reference["key"]
            value = secrets.get(name, {}).get(key) or ELSEWHERE.get(key, "s" * 32)
        for name, known in environment.items():
            value = value.replace(f"$({name})", known)
        environment[entry["name"]] = value
    return environment


def _complete(rendering: Rendering, component: str) -> ClusterConfig:
    """What a pod of this kind makes of the arguments and its environment."""
    (application,) = rendering.serve_config["applications"]
    secrets = {item["metadata"]["name"]: item["stringData"] for item in rendering.of_kind("Secret")}
    (template,) = (spec for name, spec in rendering.pod_templates() if name == component)
    environment = _environment(template["spec"]["containers"][0], secrets)
    assert "$(" not in environment["PACELINE_KV__TIERS"]
    if not secrets:
        # The tenants are in a Secret of the operator's.
        del environment["PACELINE_AUTH__TENANTS"]
    return parse_config(application["args"], environment)


def test_build_app_accepts_its_arguments(rendering: Rendering) -> None:
    config = _complete(rendering, "head")
    assert config.pools.target.labels == {"paceline.io/pool": "target"}
    scales = "autoscaling" in rendering.values["config"]["pools"]["target"]
    assert (config.pools.target.autoscaling is not None) == scales
    assert (config.pools.draft is None) == ("draft" not in rendering.values["config"]["pools"])


def test_the_chart_deploys_what_the_command_line_renders(rendering: Rendering) -> None:
    expected = copy.deepcopy(rendering.serve_config)
    (application,) = expected["applications"]
    server = ServerConfig(
        http_port=expected["http_options"]["port"], grpc_port=expected["grpc_options"]["port"]
    )
    rendered = render(_complete(rendering, "head").model_copy(update={"server": server}))
    (rendered_application,) = rendered.serve_config["applications"]
    # The command line writes only what differs from the defaults.
    rendered_application["args"] = application["args"]
    assert rendered.serve_config == expected


def test_the_pods_environment_completes_the_config(rendering: Rendering) -> None:
    has_secrets = bool(rendering.of_kind("Secret"))
    for component, template in rendering.pod_templates():
        if component in ("valkey", "gcs"):
            continue
        complete = _complete(rendering, component)
        told = {
            entry["name"]: entry.get("value") for entry in containers(template["spec"])[-1]["env"]
        }
        assert complete.kv is not None
        assert [tier.kind for tier in complete.kv.tiers] == [
            tier["kind"] for tier in yaml.safe_load(told["PACELINE_KV__TIERS"])
        ]
        has_key = complete.kv.encryption_key is not None
        assert has_key == rendering.values["auth"]["encryptPages"]
        if has_secrets:
            assert [tenant.name for tenant in complete.auth.tenants] == [
                tenant["name"] for tenant in rendering.values["auth"]["tenants"]
            ]

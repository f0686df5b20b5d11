"""The chart, rendered once for every file of ``ci/``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import helm_python as helm
import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path("k8s/chart")
RELEASE = "demo"
NAMESPACE = "serving"
PAGE_COMPONENTS = {"target", "prefill"}
"""Kinds of pods that read and write pages."""
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))


def render(values: dict[str, Any]) -> dict[str, str]:
    """Template path -> rendered text.

    Raises:
        helm.HelmValuesError: the values do not fit values.schema.json.
        helm.HelmRenderError: a template refuses them.
    """
    with helm.Chart.load(CHART) as chart:
        return chart.render(values, name=RELEASE, namespace=NAMESPACE)


def objects(rendered: dict[str, str]) -> list[dict[str, Any]]:
    """The Kubernetes objects of a rendering."""
    return [
        document
        for path, text in sorted(rendered.items())
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def named_ports(template: dict[str, Any]) -> dict[str, int]:
    """Names and numbers of the ports that a pod template's containers have."""
    return {
        port["name"]: port["containerPort"]
        for container in containers(template["spec"])
        for port in container.get("ports", [])
    }


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod with these labels."""
    matches = selector.get("matchLabels", {}).items() <= labels.items()
    return matches and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", [])
    )


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a pod, those that start before the others too."""
    found: list[dict[str, Any]] = [*spec.get("initContainers", []), *spec["containers"]]
    return found


@dataclass(frozen=True)
class Rendering:
    """What one values file makes of the chart."""

    values: dict[str, Any]
    files: dict[str, str]
    objects: list[dict[str, Any]]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] == kind]

    @property
    def ray_service(self) -> dict[str, Any]:
        (service,) = self.of_kind("RayService")
        return service

    @property
    def ray_cluster(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.ray_service["spec"]["rayClusterConfig"]
        return spec

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.ray_service["spec"]["serveConfigV2"])
        return config

    def pod_templates(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every pod template with its component's name."""
        cluster = self.ray_cluster
        templates = [cluster["headGroupSpec"]["template"]]
        templates += [group["template"] for group in cluster["workerGroupSpecs"]]
        templates += [item["spec"]["template"] for item in self.of_kind("StatefulSet")]
        for template in templates:
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template


@functools.cache
def _rendering(path: Path) -> Rendering:
    with helm.Chart.load(CHART) as chart:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        merged = chart.merge_values(values)
    files = render(values)
    return Rendering(merged, files, objects(files))


@pytest.fixture(params=CI_VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def rendering(request: pytest.FixtureRequest) -> Rendering:
    return _rendering(request.param)


@pytest.fixture(params=CI_VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def ci_values(request: pytest.FixtureRequest) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(request.param.read_text(encoding="utf-8"))
    return values

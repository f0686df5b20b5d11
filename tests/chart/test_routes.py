"""Ways to the pods: services, routes from outside, TLS, and the chart's own test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from tests.chart.conftest import containers, named_ports, selects

if TYPE_CHECKING:
    from tests.chart.conftest import Rendering

ROUTES = {"HTTPRoute": "http", "GRPCRoute": "grpc"}
PORTS_WITH_TLS = {"http": "https", "grpc": "grpcs"}


def _is_tls(rendering: Rendering, what: str) -> bool:
    tls = rendering.values["tls"]
    return bool(tls["existingSecret"]) and bool(tls[what])


def test_services_reach_a_port_of_the_pods_they_select(rendering: Rendering) -> None:
    is_tls = _is_tls(rendering, "surfaces")
    for service in rendering.of_kind("Service"):
        selected = [
            template
            for _, template in rendering.pod_templates()
            if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ]
        assert len(selected) == 1, service["metadata"]["name"]
        ports = {port["name"] for port in service["spec"]["ports"]}
        component = selected[0]["metadata"]["labels"]["app.kubernetes.io/component"]
        is_ingress = component == "ingress"
        assert ports == ({"http", "grpc"} if is_ingress else {"valkey"})
        own = named_ports(selected[0])
        for port in service["spec"]["ports"]:
            if is_ingress and is_tls:
                # By number: not every Kubernetes looks for names in containers that start first.
                assert port["targetPort"] == own[PORTS_WITH_TLS[port["name"]]]
                assert port["appProtocol"] == "https"
            else:
                assert own[port["targetPort"]] == port["port"]


def client_service(rendering: Rendering) -> dict[str, Any]:
    (service,) = (
        item
        for item in rendering.of_kind("Service")
        if item["spec"]["selector"]["app.kubernetes.io/component"] == "ingress"
    )
    return service


def test_ways_in_lead_to_a_port_of_the_service(rendering: Rendering) -> None:
    values, service = rendering.values["ingress"], client_service(rendering)
    ways = rendering.of_kind("Ingress")
    hosts = [values["httpHost"], values["grpcHost"]] if values["enabled"] else []
    assert {way["spec"]["rules"][0]["host"] for way in ways} == {host for host in hosts if host}
    ports = {port["name"] for port in service["spec"]["ports"]}
    for way in ways:
        (rule,) = way["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        backend = path["backend"]["service"]
        assert backend["name"] == service["metadata"]["name"]
        assert backend["port"]["name"] in ports
        assert rule["host"] == values[f"{backend['port']['name']}Host"]
        covered = [host for entry in way["spec"].get("tls", []) for host in entry["hosts"]]
        assert covered == ([rule["host"]] if values["tlsSecret"] else [])


def test_gateway_routes_lead_to_a_port_of_the_service(rendering: Rendering) -> None:
    values, service = rendering.values["gateway"], client_service(rendering)
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    for kind, surface in ROUTES.items():
        routes = rendering.of_kind(kind)
        hosts = values[f"{surface}Hosts"] if values["enabled"] else []
        assert [route["spec"]["hostnames"] for route in routes] == ([hosts] if hosts else [])
        for route in routes:
            assert route["spec"]["parentRefs"] == values["parentRefs"]
            (rule,) = route["spec"]["rules"]
            (backend,) = rule["backendRefs"]
            assert backend == {"name": service["metadata"]["name"], "port": ports[surface]}


def test_the_proxy_takes_tls_in_front_of_what_serve_listens_on(rendering: Rendering) -> None:
    values = rendering.values
    configs = [
        item for item in rendering.of_kind("ConfigMap") if "haproxy.cfg" in item.get("data", {})
    ]
    assert bool(configs) == _is_tls(rendering, "surfaces")
    for component, template in rendering.pod_templates():
        first = template["spec"].get("initContainers", [])
        assert bool(first) == (bool(configs) and component == "ingress")
        for proxy in first:
            # Only such a container outlives the replicas that drain behind it.
            assert proxy["restartPolicy"] == "Always"
            ports = {port["name"]: port["containerPort"] for port in proxy["ports"]}
            assert ports == {
                "https": values["tls"]["httpPort"],
                "grpcs": values["tls"]["grpcPort"],
            }
            (config,) = configs
            text = config["data"]["haproxy.cfg"]
            for name, port in ports.items():
                assert f"bind :{port} ssl crt /etc/paceline/tls/tls.crt" in text, name
            assert f"server ray 127.0.0.1:{values['serve']['httpPort']}\n" in text
            assert f"server ray 127.0.0.1:{values['serve']['grpcPort']} proto h2\n" in text


def test_draft_streams_have_the_mounted_certificate(rendering: Rendering) -> None:
    (application,) = rendering.serve_config["applications"]
    speculation = application["args"].get("engine", {}).get("speculation", {})
    tls = speculation.get("pool_tls")
    assert (tls is not None) == _is_tls(rendering, "drafts")
    if tls is None:
        return
    # One of the names that the chart's page asks of the certificate.
    assert tls.pop("server_name") == client_service(rendering)["metadata"]["name"]
    for component, template in rendering.pod_templates():
        if component in ("target", "draft"):
            (container,) = template["spec"]["containers"]
            folders = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {path.rpartition("/")[0] for path in tls.values()} <= folders


def test_whoever_is_told_of_certificates_has_them(rendering: Rendering) -> None:
    secret = rendering.values["tls"]["existingSecret"]
    for component, template in rendering.pod_templates():
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for container in containers(spec):
            folders = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            told = "/etc/paceline/tls" in yaml.safe_dump(container["env"])
            if told:
                name = folders["/etc/paceline/tls"]
                assert volumes[name]["secret"]["secretName"] == secret, component
            assert not told or secret


def test_helm_test_asks_the_service_and_is_let_in(rendering: Rendering) -> None:
    (pod,) = rendering.of_kind("Pod")
    service = client_service(rendering)
    name = service["metadata"]["name"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    (container,) = pod["spec"]["containers"]
    is_tls = _is_tls(rendering, "surfaces")
    scheme, trusted = ("https", ["/etc/paceline/tls/ca.crt"]) if is_tls else ("http", [])
    addresses = [f"{scheme}://{name}:{ports['http']}", f"{name}:{ports['grpc']}"]
    assert container["args"] == addresses + trusted
    for policy in rendering.of_kind("NetworkPolicy"):
        if policy["metadata"]["name"].endswith("-clients"):
            (rule,) = policy["spec"]["ingress"]
            assert "from" not in rule or any(
                selects(peer["podSelector"], pod["metadata"]["labels"])
                for peer in rule["from"]
                if "podSelector" in peer
            )

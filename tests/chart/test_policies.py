"""Who may talk to whom, what may be disrupted, and where pods go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.chart.conftest import PAGE_COMPONENTS, objects, render, selects

if TYPE_CHECKING:
    from tests.chart.conftest import Rendering


def test_budgets_select_one_kind_of_pod_and_let_one_of_it_go(rendering: Rendering) -> None:
    budgets = rendering.of_kind("PodDisruptionBudget")
    assert not budgets or rendering.values["podDisruptionBudget"]["enabled"]
    groups = rendering.ray_cluster["workerGroupSpecs"]
    fewest = {group["groupName"]: group["minReplicas"] for group in groups}
    for budget in budgets:
        selected = [
            (component, template)
            for component, template in rendering.pod_templates()
            if selects(budget["spec"]["selector"], template["metadata"]["labels"])
        ]
        assert len(selected) == 1
        # With a percentage or maxUnavailable the budget of a RayCluster's pods cannot be computed.
        if selected[0][0] == "valkey":
            assert budget["spec"]["maxUnavailable"] == 1
        else:
            assert 0 < budget["spec"]["minAvailable"] < fewest[selected[0][0]]


def test_pools_that_may_have_no_pod_to_spare_have_no_budget() -> None:
    values: dict[str, Any] = {"auth": {"existingSecret": "s"}, "pools": {"target": {"minPods": 3}}}
    budgets = {
        item["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: item["spec"]
        for item in objects(render(values))
        if item["kind"] == "PodDisruptionBudget"
    }
    # The ingress pool may shrink to one pod.
    assert {name: spec["minAvailable"] for name, spec in budgets.items()} == {"target": 1}


def test_network_policies_cover_every_pod(rendering: Rendering) -> None:
    policies = rendering.of_kind("NetworkPolicy")
    assert bool(policies) == rendering.values["networkPolicy"]["enabled"]
    if not policies:
        return
    for policy in policies:
        selector = policy["spec"]["podSelector"]
        assert any(
            selects(selector, template["metadata"]["labels"])
            for _, template in rendering.pod_templates()
        ), policy["metadata"]["name"]
    for component, template in rendering.pod_templates():
        labels = template["metadata"]["labels"]
        types = {
            direction
            for policy in policies
            if selects(policy["spec"]["podSelector"], labels)
            for direction in policy["spec"]["policyTypes"]
        }
        assert types == {"Ingress", "Egress"}, component


def _may(rendering: Rendering, source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod with these labels open a connection to another one's port."""

    def passes(labels: dict[str, str], others: dict[str, str], direction: str) -> bool:
        peers = {"Ingress": "from", "Egress": "to"}[direction]
        policies = [
            policy["spec"]
            for policy in rendering.of_kind("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels)
            and direction in policy["spec"]["policyTypes"]
        ]
        rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
        return not policies or any(
            ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
            and (
                peers not in rule
                or any(
                    selects(peer["podSelector"], others)
                    for peer in rule[peers]
                    if "podSelector" in peer and "namespaceSelector" not in peer
                )
            )
            for rule in rules
        )

    return passes(source, target, "Egress") and passes(target, source, "Ingress")


def test_policies_let_through_what_must_pass_and_nothing_to_the_servers_else(
    rendering: Rendering,
) -> None:
    labels = {name: spec["metadata"]["labels"] for name, spec in rendering.pod_templates()}
    values = rendering.values
    is_closed = values["networkPolicy"]["enabled"]
    ray = [name for name in labels if name not in ("valkey", "gcs")]
    for source in ray:
        for target in ray:
            assert _may(rendering, labels[source], labels[target], 10_001), (source, target)
    pages = values["valkey"]["port"]
    ports = [("gcs", 6379, {"head"}), ("valkey", pages, PAGE_COMPONENTS)]
    if values["valkey"]["shards"] > 1:
        bus = pages + 10_000
        ports.append(("valkey", bus, {"valkey"}))
        assert _may(rendering, labels["valkey"], labels["valkey"], pages)
        assert not is_closed or not _may(rendering, labels["target"], labels["valkey"], bus)
    for server, port, clients in ports:
        if server not in labels:
            continue
        for other in labels:
            is_let_in = _may(rendering, labels[other], labels[server], port)
            if other in clients:
                assert is_let_in, (other, server)
            elif other in ray:
                assert is_let_in == (not is_closed), (other, server)


def test_clients_reach_the_ports_of_the_service_alone(rendering: Rendering) -> None:
    labels = {name: spec["metadata"]["labels"] for name, spec in rendering.pod_templates()}
    (pod,) = rendering.of_kind("Pod")  # of helm test: a client like any other
    values = rendering.values
    has_tls = bool(values["tls"]["existingSecret"]) and values["tls"]["surfaces"]
    told, plain = values["tls" if has_tls else "serve"], values["serve"]
    for name in ("httpPort", "grpcPort"):
        client = pod["metadata"]["labels"]
        assert _may(rendering, client, labels["ingress"], told[name])
        if has_tls and values["networkPolicy"]["enabled"]:
            assert not _may(rendering, client, labels["ingress"], plain[name])


def test_spans_may_leave_for_the_collector(rendering: Rendering) -> None:
    tracing = rendering.values["config"].get("tracing", {})
    ports = {
        entry["port"]
        for policy in rendering.of_kind("NetworkPolicy")
        for rule in policy["spec"].get("egress", [])
        for entry in rule.get("ports", [])
        if "to" not in rule
    }
    if tracing.get("exporter") == "otlp":
        assert int(tracing["otlp_endpoint"].rpartition(":")[2]) in ports


def test_pods_of_a_kind_spread(rendering: Rendering) -> None:
    values = rendering.values
    for component, template in rendering.pod_templates():
        rules: list[dict[str, Any]] = template["spec"].get("topologySpreadConstraints", [])
        own = values["pools"].get(component, {}).get("topologySpreadConstraints")
        assert [rule["topologyKey"] for rule in rules] == (
            [rule["topologyKey"] for rule in own] if own else values["spreadOver"]
        )
        for rule in rules:
            # Counts its own pods: else it would spread nothing.
            assert selects(rule["labelSelector"], template["metadata"]["labels"]), component

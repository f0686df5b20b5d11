"""The chart's own Valkey servers, from the commands it renders: a cluster, and one that keeps."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
import redis
import yaml

from cluster.config_loader import parse_config
from kv_store.page_format import section_offsets
from kv_store.tiers.valkey import ValkeyTier
from kv_store.tiers.valkey_topology import valkey_address
from tests.certificates import Authority
from tests.chart.conftest import CHART, objects, render
from tests.integration.cluster.chart_valkey import (
    PASSWORD,
    ChartValkey,
    server_with_tls,
    usable_port,
)
from tests.kv_pages import make_chain, make_layout, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster.config import ClusterConfig

pytestmark = pytest.mark.integration

SHARDS = 3
SECRETS = {"VALKEY_PASSWORD": PASSWORD, "PACELINE_AUTH__TENANTS": "[]"}
KEYS = make_chain(make_layout(), 60)
ITEMS = [(key, bytes([key.index]) * 2000) for key in KEYS]
PATIENT_S = 120


def rendered(**values: Any) -> list[dict[str, Any]]:
    smallest = yaml.safe_load((CHART / "ci/default-values.yaml").read_text(encoding="utf-8"))
    return objects(render(smallest | values))


def target_config(made: list[dict[str, Any]], folder: Path) -> ClusterConfig:
    """What a target replica reads."""
    (service,) = (item for item in made if item["kind"] == "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (target,) = (
        group
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        if group["groupName"] == "target"
    )
    (container,) = target["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]} | SECRETS
    environment["PACELINE_AUTH__CLUSTER_SECRET"] = "s" * 32
    tiers = environment["PACELINE_KV__TIERS"].replace("$(VALKEY_PASSWORD)", PASSWORD)
    environment["PACELINE_KV__TIERS"] = tiers.replace("/etc/paceline", str(folder))
    return parse_config(application["args"], environment)


class Cluster:
    """The chart's cluster, and what a target replica knows of it."""

    def __init__(self, folder: Path, *, is_tls: bool) -> None:
        values: dict[str, Any] = {"valkey": {"shards": SHARDS, "port": usable_port()}}
        if is_tls:
            values["tls"] = {"existingSecret": "certificates"}
        made = rendered(**values)
        self.pods = ChartValkey(
            made,
            f"demo-paceline-valkey-{SHARDS}",
            folder,
            server=server_with_tls() if is_tls else None,
        )
        names = ["demo-paceline-valkey", f"*.{self.pods.domain}"]
        if is_tls:
            Authority().write(folder / "tls", names)
        config = target_config(made, folder)
        assert config.kv is not None
        (self._tier_config,) = (tier for tier in config.kv.tiers if tier.kind == "valkey")
        self._is_tls = is_tls
        self._folder = folder
        for number in range(SHARDS):
            self.pods.start(number)

    def tier(self) -> ValkeyTier:
        """As the configuration names it, with a patience for slow machines."""
        return ValkeyTier(
            valkey_address(self._tier_config),
            ttl_s=600.0,
            ttl_head_boost=1.0,
            connect_timeout_s=5.0,
            operation_timeout_s=10.0,
            max_connections=2,
            find_cuts=section_offsets,
        )

    def ask(self, number: int, *command: str) -> Any:
        """A shard's own answer."""
        trusted = str(self._folder / "tls/ca.crt")
        secure = {"ssl": True, "ssl_ca_certs": trusted, "ssl_check_hostname": False}
        with redis.Redis(
            host=self.pods.pods[number].ip,
            port=self.pods.port,
            password=PASSWORD,
            decode_responses=True,
            **(secure if self._is_tls else {}),
        ) as client:
            return client.execute_command(*command)

    def names(self) -> list[str]:
        return [str(self.ask(number, "CLUSTER", "MYID")) for number in range(SHARDS)]

    def is_whole(self) -> bool:
        """Whether every shard says that each has its part."""
        try:
            told = [self.ask(number, "CLUSTER INFO") for number in range(SHARDS)]
            nodes = [self.ask(number, "CLUSTER NODES") for number in range(SHARDS)]
        except (redis.RedisError, OSError):
            return False
        current = {f"{pod.ip}:{self.pods.port}" for pod in self.pods.pods}
        return all(
            info["cluster_state"] == "ok"
            and int(info["cluster_slots_ok"]) == 16384
            and int(info["cluster_known_nodes"]) == SHARDS
            and set(known) == current
            and all(node["connected"] for node in known.values())
            for info, known in zip(told, nodes, strict=True)
        )

    def sizes(self) -> list[int]:
        return [int(self.ask(number, "DBSIZE")) for number in range(SHARDS)]


@pytest.fixture(params=["plain", "tls"])
def cluster(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    is_tls = request.param == "tls"
    if is_tls and server_with_tls() is None:
        pytest.skip("no valkey-server of this machine; that of the tests has no TLS")
    made = Cluster(tmp_path, is_tls=is_tls)
    ask_dns = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        known = made.pods.addresses()
        if host == "demo-paceline-valkey" and known:  # the service: any pod
            host = next(iter(known.values()))
        return ask_dns(known.get(host, host), *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield made
    made.pods.stop()


async def test_rendered_pods_become_a_cluster_and_stay_one(cluster: Cluster) -> None:
    wait_until(cluster.is_whole, PATIENT_S)
    assert all(pod.ping() == 0 for pod in cluster.pods.pods)
    told = cluster.pods.pods[0].run("ask", "cluster", "info")
    assert "cluster_state:ok" in told.stdout, told
    names = cluster.names()
    tier = cluster.tier()
    try:
        assert await tier.put_many(ITEMS) == [True] * len(ITEMS)
        assert await tier.get_many(KEYS) == [blob for _, blob in ITEMS]
        sizes = cluster.sizes()
        assert sum(sizes) == len(KEYS)
        assert min(sizes) > 0

        # A pod is replaced: another address, nothing left, the same part of the pages.
        cluster.pods.kill(1)
        assert cluster.pods.pods[1].ping() != 0
        cluster.pods.start(1)
        wait_until(cluster.is_whole, PATIENT_S)
        assert cluster.names() == names
        assert cluster.sizes() == [sizes[0], 0, sizes[2]]
    finally:
        await tier.aclose()

    # All at once, as when their nodes go: nobody knows an address that is still right.
    for number in range(SHARDS):
        cluster.pods.kill(number)
    for number in range(SHARDS):
        cluster.pods.start(number)
    wait_until(cluster.is_whole, PATIENT_S)
    assert cluster.names() == names
    tier = cluster.tier()
    try:
        assert await tier.put_many(ITEMS) == [True] * len(ITEMS)
        assert await tier.get_many(KEYS) == [blob for _, blob in ITEMS]
        assert cluster.sizes() == sizes
    finally:
        await tier.aclose()


def is_written(client: redis.Redis) -> bool:
    told = client.info("persistence")
    return told["aof_buffer_length"] == 0 and told["aof_pending_bio_fsync"] == 0


def test_the_control_planes_server_keeps_what_it_was_told(tmp_path: Path) -> None:
    auth = {"clusterSecret": "s" * 32, "valkeyPassword": PASSWORD, "gcsPassword": PASSWORD}
    made = rendered(ray={"gcsFaultTolerance": {"enabled": True}}, auth=auth)
    server = ChartValkey(made, "demo-paceline-gcs", tmp_path)
    try:
        for told in (None, "still there"):
            pod = server.start(0, keeps_data=True)
            wait_until(lambda pod=pod: pod.ping() == 0, PATIENT_S)
            with redis.Redis(
                host=pod.ip, port=server.port, password=PASSWORD, decode_responses=True
            ) as client:
                assert client.get("a key") == told
                assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
                client.set("a key", "still there")
                wait_until(lambda client=client: is_written(client), PATIENT_S)
            server.kill(0)
    finally:
        server.stop()

"""The chart's ``serveConfigV2``, run by Ray's own command on nodes labelled as the chart's pods."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
import yaml

from cluster.config import default_cache_dir
from cluster.load.run import LoadTest
from cluster.load.summary import Slo
from cluster.load.surfaces import surfaces
from cluster.load.workload import LoadRequest
from cluster.local_ray import run_folder
from cluster.ports import PortLease
from cluster.processes import ClusterProcesses
from cluster.ray_environment import local_environment
from cluster.state import secret_file
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.certificates import Authority
from tests.chart.conftest import CHART, objects, render
from tests.integration.cluster.rendered_cluster import deploy
from tests.valkey_processes import (
    PASSWORD,
    ValkeyProcess,
    die_with_parent,
    free_ports,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.load.outcome import Outcome
    from cluster.ports import ClusterPorts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
MODEL = "smollm2-135m-instruct"
KEY = "a-key-of-acme"
PROMPT = "One, two, three, four, five, six, " * 12
AUTH = {"authorization": f"Bearer {KEY}"}
START_S = 400.0
UPDATE_S = 400.0
DRAINING = (
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S",
)


def _values(ports: ClusterPorts) -> dict[str, Any]:
    """The smallest install, with less memory, a tenant, and a page tier that is reachable here."""
    values: dict[str, Any] = yaml.safe_load((CHART / "ci/default-values.yaml").read_text())
    values["serve"] = {"httpPort": ports.http, "grpcPort": ports.grpc}
    values["config"] = {
        "engine": {"max_model_len": 512, "num_pages": 32},
        "draft": {"drafter": "suffix"},
    }
    values["auth"]["tenants"] = [
        # Requests of an update wait for its only target replica, however long that takes to start.
        {"name": "acme", "api_keys": [KEY], "max_concurrent_requests": 1000}
    ]
    values["valkey"] = {"enabled": False}
    values["externalValkey"] = {"existingSecret": "page-tier"}
    values["ssd"] = {"enabled": False}
    return values


def _pod_environment(service: dict[str, Any], made: dict[str, Any], url: str) -> dict[str, str]:
    """What the kubelet would set in the chart's pods."""
    [template] = {
        json.dumps(group["template"]["spec"]["containers"][0]["env"])
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    stored = {made["metadata"]["name"]: made["stringData"], "page-tier": {"url": url}}
    found: dict[str, str] = {}
    for entry in json.loads(template):
        if "value" in entry:
            value = entry["value"]
        else:
            wanted = entry["valueFrom"]["secretKeyRef"]
            value = stored[wanted["name"]][wanted["key"]]
        for name, known in found.items():
            value = value.replace(f"$({name})", known)
        found[entry["name"]] = value
    return found


def _nodes(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and one node of each group, as KubeRay starts them."""
    cluster = service["spec"]["rayClusterConfig"]
    head = {"num_cpus": int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])}
    workers = [
        {
            "num_cpus": int(
                group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
            ),
            "labels": group["labels"],
        }
        for group in cluster["workerGroupSpecs"]
    ]
    return [head, *workers]


@dataclass(frozen=True, kw_only=True)
class Served:
    """The running cluster: what was deployed on it, and with which variables."""

    ports: ClusterPorts
    config: dict[str, Any]
    environment: dict[str, str]
    folder: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyProcess]:
    process = ValkeyProcess({})
    yield process
    process.stop()


@pytest.fixture(scope="module")
def served(valkey: ValkeyProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    prepare_builtin(default_cache_dir(), print)
    folder = tmp_path_factory.mktemp("rendered")
    cluster_id = secrets.token_hex(4)
    with (
        PortLease(folder / "locks", host="127.0.0.1", http=0, grpc=0, metrics=0) as ports,
        run_folder(cluster_id) as run_dir,
    ):
        made = {item["kind"]: item for item in objects(render(_values(ports)))}
        service = made["RayService"]
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        # The nodes have one address here, so that only one of them can hold the ports.
        config["proxy_location"] = "HeadOnly"
        told = folder / "told.json"
        told.write_text(
            json.dumps({"nodes": _nodes(service), "serve_config": config, "folder": str(run_dir)})
        )
        url = f"redis://:{PASSWORD}@{valkey.address}/0"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PACELINE_", "RAY_"))}
        environment = (
            kept
            | local_environment(
                cluster_id=cluster_id,
                run_dir=run_dir,
                token_path=secret_file(folder, "ray-token"),
                ports=ports,
                num_threads=1,
            )
            | _pod_environment(service, made["Secret"], url)
        )
        for name in DRAINING:  # as Ray has them in a pod
            del environment[name]
        processes = ClusterProcesses(cluster_id, run_dir)
        log = folder / "log"
        with log.open("w") as out:
            running = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.cluster.rendered_cluster", str(told)],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            served = Served(ports=ports, config=config, environment=environment, folder=run_dir)
            _wait_until_ready(running, f"{served.http}/health", log)
            processes.remember()
            yield served
            running.send_signal(signal.SIGTERM)
        finally:
            left = processes.end(60)
            running.wait(60)
        assert not left


def _wait_until_ready(running: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(url, timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)


def _ask_as_the_chart(made: list[dict[str, Any]], replaced: dict[str, str]) -> None:
    """Run the pod of ``helm test``, with parts of its arguments replaced."""
    (pod,) = (item for item in made if item["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    arguments = container["args"]
    for old, new in replaced.items():
        arguments = [argument.replace(old, new) for argument in arguments]
    python, *rest = container["command"]
    assert python == "python"
    command = [sys.executable, *rest, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert "SERVING" in told.stdout


def test_the_charts_own_test_passes_on_it(served: Served) -> None:
    # The Service is loopback here.
    _ask_as_the_chart(objects(render(_values(served.ports))), {"demo-paceline": "127.0.0.1"})


def test_the_charts_proxy_gives_it_tls(served: Served, tmp_path: Path) -> None:
    values = _values(served.ports)
    https, grpcs = free_ports(2)
    values["tls"] = {"existingSecret": "certificates", "httpPort": https, "grpcPort": grpcs}
    made = objects(render(values))
    (config,) = (item for item in made if "haproxy.cfg" in item.get("data", {}))
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text.replace("/etc/paceline", str(tmp_path)))
    authority = Authority()
    authority.write(tmp_path / "tls", ["localhost"])
    (service,) = (item for item in made if item["kind"] == "RayService")
    (ingress,) = (
        group
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        if group["groupName"] == "ingress"
    )
    (proxy,) = ingress["template"]["spec"]["initContainers"]
    environment = {entry["name"]: entry["value"] for entry in proxy["env"]} | {
        "CONF_DIR": str(tmp_path),
        "TLS_DIR": str(tmp_path / "tls"),
        "LOOK_SECONDS": "0.5",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    shell, script = proxy["command"]
    running = subprocess.Popen(
        [shell, str(tmp_path / Path(script).name)],
        env=environment,
        preexec_fn=die_with_parent,
    )

    def certificate() -> str:
        try:
            return ssl.get_server_certificate(("localhost", https), timeout=10)
        except OSError:
            return ""

    try:
        wait_until(lambda: certificate() != "", 120)
        first = certificate()
        ports = {str(served.ports.http): str(https), str(served.ports.grpc): str(grpcs)}
        here = {"demo-paceline": "localhost", "/etc/paceline": str(tmp_path)}
        _ask_as_the_chart(made, here | ports)
        # A renewed certificate is taken without a restart.
        authority.write(tmp_path / "tls", ["localhost"])
        wait_until(lambda: certificate() not in ("", first), 120)
        _ask_as_the_chart(made, here | ports)
        assert running.poll() is None
    finally:
        running.terminate()
        running.wait(60)


def _complete(served: Served, **changed: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | changed
    return httpx.post(f"{served.http}/v1/completions", json=body, headers=AUTH, timeout=120)


def test_the_rendered_config_serves_over_http_and_grpc(
    served: Served, valkey: ValkeyProcess
) -> None:
    assert httpx.post(f"{served.http}/v1/completions", json={}, timeout=120).status_code == 401
    answer = _complete(served)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert text

    asked = pb.GenerateRequest(
        model=MODEL,
        text=PROMPT,
        sampling=pb.SamplingOptions(max_tokens=8, temperature=0.0),
    )
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.GenerateUnary(asked, timeout=120)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        response = stub.GenerateUnary(asked, timeout=120, metadata=tuple(AUTH.items()))
    assert response.choices[0].text == text
    # The prompt's whole pages go to the tier that the Secret names.
    wait_until(lambda: valkey.admin.dbsize() > 0, 120)


def test_a_changed_config_replaces_every_replica_without_a_lost_request(served: Served) -> None:
    before = _complete(served, n=2)
    assert before.status_code == 200
    config = copy.deepcopy(served.config)
    (application,) = config["applications"]
    # The first shows which ingress answers; the second is an argument of every pool.
    application["args"]["ingress"] = {"max_choices": 1}
    application["args"]["tracing"] = {"sample_ratio": 0.5}

    def is_updated() -> bool:
        own = _complete(served)
        assert own.status_code == 200, own.text
        replaced = own.headers["x-paceline-replica"] != before.headers["x-paceline-replica"]
        return replaced and all(_complete(served, n=2).status_code == 400 for _ in range(5))

    async def load() -> list[Outcome]:
        schedule = [
            LoadRequest(
                at_s=float(number), prompt=f"Count to {number}.", max_tokens=16, ignore_eos=True
            )
            for number in range(round(UPDATE_S))
        ]
        through = surfaces(
            ("http", "grpc"),
            http_url=served.http,
            grpc_address=served.grpc,
            model=MODEL,
            api_key=KEY,
            temperature=0.0,
        )
        test = LoadTest(
            schedule=schedule, surfaces=through, slo=Slo(), timeout_s=300, max_in_flight=1000
        )
        stop = asyncio.Event()
        running = asyncio.create_task(test.run(lambda _: None, stop))
        deadline = time.monotonic() + UPDATE_S
        while not await asyncio.to_thread(is_updated):
            assert time.monotonic() < deadline, "not updated"
            await asyncio.sleep(0.5)
        stop.set()
        _, outcomes = await running
        return outcomes

    told = deploy(served.folder, config, "--non-blocking", environment=served.environment)
    try:
        outcomes = asyncio.run(load())
        assert told.wait(120) == 0
    finally:
        told.kill()
    assert {each.surface for each in outcomes if each.ending == "complete"} == {"http", "grpc"}
    assert [each.error for each in outcomes if each.error is not None] == []

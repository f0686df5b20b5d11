"""Whether a server is set up to hold a cache of pages: bounded, evicting, and not on disk.

The settings it should have (docs/operations.md tells why):

    maxmemory         a bound; without one pages fill the machine until the kernel ends the server
    maxmemory-policy  allkeys-lfu; volatile-lfu if others store there too; or their lru forms
    save, appendonly  "" and no: pages are worth nothing after a restart, and copies cost memory
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import ResponseError

from kv_store.tiers.valkey_admin import admin_clients

if TYPE_CHECKING:
    from redis import Redis

    from kv_store.tiers.valkey_topology import ValkeyAddress

_GOOD_POLICIES = ("allkeys-lfu", "volatile-lfu", "allkeys-lru", "volatile-lru")
_MIN_VERSION = (6, 2)  # the first with GETEX


class SettingsProblem(NamedTuple):
    """Something about a server.

    Attributes:
        is_fatal: whether it cannot be used, or not safely.
        text: what is wrong and what to set; names the server where there are several.
    """

    is_fatal: bool
    text: str


def check_settings(address: ValkeyAddress, timeout_s: float) -> list[SettingsProblem]:
    """Ask every primary.

    Args:
        address: where they are.
        timeout_s: of each connection attempt and each reply.

    Raises:
        TierUnavailableError: one of them, or all, cannot be reached.
    """
    problems: list[SettingsProblem] = []
    with admin_clients(address, timeout_s) as clients:
        for client in clients:
            kwargs = client.connection_pool.connection_kwargs
            where = f"{kwargs.get('host')}:{kwargs.get('port')}: " if len(clients) > 1 else ""
            found = _check(client, is_cluster=address.is_cluster)
            problems += [problem._replace(text=where + problem.text) for problem in found]
    return problems


def _check(client: Redis, *, is_cluster: bool) -> list[SettingsProblem]:
    try:
        info: dict[str, Any] = client.info()
    except ResponseError as exc:
        return [SettingsProblem(False, f"its settings cannot be checked: INFO: {exc}")]
    problems: list[SettingsProblem] = []

    def fatal(text: str) -> None:
        problems.append(SettingsProblem(True, text))

    def warn(text: str) -> None:
        problems.append(SettingsProblem(False, text))

    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _MIN_VERSION:
        fatal(f"version {version} is too old: 6.2 or newer is needed")
    if info.get("cluster_enabled") and not is_cluster:
        fatal("it is a node of a cluster: set is_cluster")
    if info.get("role") == "slave":
        fatal("it is a replica, which takes no pages: name the primary, or its Sentinels")
    if not info.get("maxmemory"):
        fatal("nothing bounds its memory: set maxmemory")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        warn("once full it refuses new pages: set maxmemory-policy allkeys-lfu")
    elif policy not in _GOOD_POLICIES:
        warn(f"maxmemory-policy {policy} evicts pages in use: set allkeys-lfu")
    if info.get("aof_enabled"):
        warn("it writes pages to an append-only file: set appendonly no")
    if _snapshots(client):
        warn('it writes pages to snapshots: set save ""')
    return problems


def _snapshots(client: Redis) -> str:
    """The rule by which it takes them; empty also where CONFIG is not allowed."""
    try:
        return str(client.config_get("save").get("save", ""))
    except ResponseError:
        return ""

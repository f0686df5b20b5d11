"""What a human may set about the KV tier. Frozen; read once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

_MIB = 1 << 20
_GIB = 1 << 30
HOST_PATTERN = r"[0-9A-Za-z:_-]{1,63}(?:\.[0-9A-Za-z:_-]{1,63})*\.?"
"""No label may be empty or longer: resolvers raise what is no OSError."""
_VALKEY_OPTION = re.compile(
    r"(client_name|ssl_(ca_certs|ca_path|cert_reqs|certfile|check_hostname|keyfile|password))=.+"
    r"|db=\d+"
)


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _TierConfig(_Config):
    name: str = Field(default="", pattern=r"^[a-z0-9-]*$")
    """Shown in stats, spans and metrics; the kind by default, and unique within a store."""
    operation_timeout_s: float = Field(default=1.0, gt=0)
    """An operation that takes longer counts as a failure of the tier."""


class MemoryTierConfig(_TierConfig):
    """Host memory of one process; nothing is shared."""

    kind: Literal["memory"] = "memory"
    """Which tier this is."""
    budget_bytes: int = Field(default=1 * _GIB, gt=0)
    """Least recently used pages leave beyond this."""


class _ValkeyClientConfig(_TierConfig):
    ttl_s: float = Field(default=3600.0, gt=0)
    """Seconds a page lives after it was written or last read."""
    ttl_head_boost: float = Field(default=1.0, ge=0)
    """The page at index i of its chain lives ``1 + boost / (1 + i)`` times as long."""
    tenant_quota_bytes: int | None = Field(default=None, ge=1)
    """Bytes in the server of one tenant's pages, of one model and fidelity; beyond it new ones are
    refused and counted. Pages that the server has evicted count for a while."""
    connect_timeout_s: float = Field(default=0.2, gt=0)
    """Limit of one connection attempt; short, as requests wait for it."""
    max_connections: int = Field(default=2, ge=1, le=64)
    """Connections of one process to each server, each with a thread; two saturate a link."""


class ValkeyTierConfig(_ValkeyClientConfig):
    """A Valkey or Redis server or cluster that somebody else runs, shared by all replicas."""

    kind: Literal["valkey"] = "valkey"
    """Which tier this is."""
    url: SecretStr
    """``redis://``, ``rediss://`` or ``unix://``, with user and password if need be. Of a cluster,
    any nodes, separated by commas: ``redis://10.0.0.1:6379,10.0.0.2:6379``. Options behind a ``?``
    are redis-py's ``client_name``, ``db`` and, with ``rediss://``, ``ssl_ca_certs``,
    ``ssl_ca_path``, ``ssl_cert_reqs``, ``ssl_certfile``, ``ssl_check_hostname``,
    ``ssl_keyfile`` and ``ssl_password``."""
    is_cluster: bool = False
    """Whether ``url`` names nodes of a Valkey or Redis Cluster; pages spread over its shards."""
    sentinels: SecretStr | None = None
    """``redis://host:26379,host:26379``: Sentinels that know the primary, with a password of their
    own if need be; the host of ``url`` is then the name of the service."""

    @field_validator("url", "sentinels")
    @classmethod
    def _check_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            _check_valkey_url(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _check_topology(self) -> Self:
        url = self.url.get_secret_value()
        if self.is_cluster and self.sentinels:
            raise ValueError("a cluster has no Sentinels: set is_cluster or sentinels, not both")
        if (self.is_cluster or self.sentinels) and url.startswith("unix://"):
            raise ValueError("a unix:// url is one server, no cluster and no service of Sentinels")
        if "," in url.rpartition("@")[2] and not self.is_cluster:
            raise ValueError("several hosts in url are the nodes of a cluster: set is_cluster")
        return self


class EmbeddedValkeyTierConfig(_ValkeyClientConfig):
    """A Valkey server on loopback that lives and dies with the store that was built from this."""

    kind: Literal["embedded_valkey"] = "embedded_valkey"
    """Which tier this is."""
    max_memory_bytes: int = Field(default=512 * _MIB, ge=16 * _MIB)
    """Least frequently used pages leave beyond this."""


class SsdTierConfig(_TierConfig):
    """A folder on a local disk; pages survive restarts."""

    kind: Literal["ssd"] = "ssd"
    """Which tier this is."""
    operation_timeout_s: float = Field(default=5.0, gt=0)
    """An operation that takes longer counts as a failure; a disk that others use may well stall."""
    root: Path
    """Each process that uses it at once claims a sub-folder of its own."""
    budget_bytes: int = Field(default=8 * _GIB, gt=0)
    """Of one process's sub-folder; beyond it, or a full disk, what was not read lately leaves."""
    segment_bytes: int = Field(default=256 * _MIB, ge=_MIB)
    """Size of one file, the unit of reclaim; no page may be larger."""
    num_read_threads: int = Field(default=2, ge=1, le=64)
    """Reads under way at once."""

    @model_validator(mode="after")
    def _check_segments(self) -> Self:
        if 2 * self.segment_bytes > self.budget_bytes:
            raise ValueError("segment_bytes may be at most half of budget_bytes")
        return self


class PeersTierConfig(_TierConfig):
    """Pages in other nodes' SSD folders; and a server that gives them those of this one's.

    Pages are found through the Valkey tier. Whoever may read that may read them; they travel in the
    clear, unless ``encryption_key`` is set.
    """

    kind: Literal["peers"] = "peers"
    """Which tier this is."""
    host: str = Field(default="", max_length=253, pattern=f"^({HOST_PATTERN})?$")
    """This node's address for other nodes; by default that of the route to the Valkey server."""
    port: int = Field(default=0, ge=0, le=65535)
    """Where this replica's page server listens; 0 takes any free port, as more than one replica of
    a node must."""
    connect_timeout_s: float = Field(default=0.2, gt=0)
    """Limit of one connection attempt; short, as requests wait for it."""
    max_connections: int = Field(default=2, ge=1, le=16)
    """Connections of this replica to each page server, each with a thread."""
    max_clients: int = Field(default=128, ge=1, le=1024)
    """Connections to this replica's page server, each with a thread; further ones are closed."""
    record_ttl_s: float = Field(default=600.0, gt=0)
    """Seconds for which others look here for a page after it was published; renewed three times as
    often."""


TierConfig = Annotated[
    MemoryTierConfig
    | ValkeyTierConfig
    | EmbeddedValkeyTierConfig
    | SsdTierConfig
    | PeersTierConfig,
    Field(discriminator="kind"),
]


class BreakerConfig(_Config):
    """When a failing tier is left alone, and for how long."""

    max_failures: int = Field(default=3, ge=1)
    """Consecutive failures after which operations are no longer tried."""
    open_s: float = Field(default=1.0, gt=0)
    """Seconds until the first probe; doubled after each failed one, with up to half of jitter."""
    max_open_s: float = Field(default=30.0, gt=0)
    """Bound of that doubling: a tier that is back is used again within 1.5 times this."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_open_s < self.open_s:
            raise ValueError("max_open_s may not be below open_s")
        return self


class WriteBackConfig(_Config):
    """The queue between the engine and the tiers; beyond either bound pages are dropped."""

    max_pages: int = Field(default=1024, ge=1)
    """Pages not written yet."""
    max_bytes: int = Field(default=512 * _MIB, ge=1)
    """Their memory."""
    batch_pages: int = Field(default=8, ge=1)
    """Pages encoded and written together."""


class MovesConfig(_Config):
    """Copies of pages from tier to tier, made behind requests' backs."""

    min_reads: int = Field(default=2, ge=1)
    """Times a page is served before it is copied into the tiers that lack it."""
    head_pages: int = Field(default=4, ge=0)
    """Pages at the head of a chain, which many prompts share, are copied at their first read. So
    are those without which a tier's pages behind them are of no use."""
    demote_before_s: float = Field(default=60.0, ge=0)
    """Seconds before a page's time to live ends at which it is copied to a tier that keeps it, if
    none does; at most half of that time."""
    max_pages: int = Field(default=4096, ge=1)
    """Served pages waiting to be looked after; beyond it they are not copied, and counted."""


class SingleFlightConfig(_Config):
    """Replicas that miss the same pages at once: one computes them, the others wait a little."""

    claim_s: float = Field(default=2.0, gt=0)
    """Seconds for which the first one is waited for, at most; a dead one costs no more."""
    wait_s: float = Field(default=0.5, gt=0)
    """Seconds that one load waits, at most half of ``engine.kv_load_timeout_s``."""
    poll_s: float = Field(default=0.02, gt=0)
    """Seconds between two looks."""
    min_pages: int = Field(default=4, ge=1)
    """Fewer missing pages are computed at once."""


class KVStoreConfig(_Config):
    """One replica's way to the shared pages."""

    codec: str = "raw"
    """``raw``, ``lossless``, ``int8``, ``k8v4``, ``int4``, or ``package.module:ClassName``."""
    max_kl: float | None = Field(default=0.01, ge=0)
    """Nats a token that a lossy codec may cost on the model, as ``paceline kv calibrate`` measures
    it. A replica whose codec costs more, or was never measured, does not start; ``null`` takes any
    loss."""
    tiers: tuple[TierConfig, ...] = (MemoryTierConfig(),)
    """Hot first. Every page is written to all of them; reads stop at the first that has it."""
    encryption_key: SecretStr | None = None
    """64 hex digits: pages are encrypted and authenticated in every tier outside this process
    (AES-256-GCM). All replicas need the same key; pages of another one are not found."""
    write_back: WriteBackConfig = WriteBackConfig()
    """How much may wait to be written."""
    breaker: BreakerConfig = BreakerConfig()
    """How failing tiers are treated; each tier has its own breakers."""
    load_batch_pages: int = Field(default=8, ge=1)
    """Pages asked of a tier in one operation."""
    max_pending_loads: int = Field(default=256, ge=1)
    """Loads under way at once; one more is answered empty."""
    num_codec_threads: int = Field(default=2, ge=1, le=64)
    """Threads that verify, encode and decode."""
    moves: MovesConfig | None = MovesConfig()
    """When a page is copied from one tier into another; ``null`` copies nothing."""
    single_flight: SingleFlightConfig | None = None
    """Whether loads wait for pages that another replica is computing; needs a Valkey tier."""
    close_timeout_s: float = Field(default=5.0, ge=0)
    """Seconds ``close`` waits for queued pages."""

    @field_validator("encryption_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", key.get_secret_value()):
            raise ValueError("encryption_key has 64 hex digits: openssl rand -hex 32 makes one")
        return key

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [tier.name or tier.kind for tier in self.tiers]
        if not names:
            raise ValueError("a store has at least one tier")
        if len(set(names)) < len(names):
            raise ValueError(f"tier names must differ: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _check_peers(self) -> Self:
        kinds = [tier.kind for tier in self.tiers]
        if kinds.count("peers") > 1:
            raise ValueError("one tier of kind peers reaches all other nodes")
        if "peers" in kinds and not {"valkey", "embedded_valkey"} & set(kinds):
            raise ValueError("a tier of kind peers finds pages through a Valkey tier: add one")
        return self


def _check_valkey_url(url: str) -> None:
    """Raise ValueError for what redis-py would not take; what it says quotes nothing of the URL."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("a Valkey url starts with redis://, rediss:// or unix://")
    try:
        parts = urlsplit(url)
        for host in parts.netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{host}").port
    except ValueError:
        is_whole = False
    else:
        is_whole = parts.scheme == "unix" or bool(re.fullmatch(r"/?\d*", parts.path))
    if not is_whole or parts.fragment:
        raise ValueError(
            "a Valkey url is redis://USER:PASSWORD@HOST:PORT/DB; in a password / is %2F, ? is %3F, "
            "# is %23 and [ is %5B"
        )
    for option in filter(None, parts.query.split("&")):
        is_known = _VALKEY_OPTION.fullmatch(option)
        if not is_known or (option.startswith("ssl_") and parts.scheme != "rediss"):
            raise ValueError("a Valkey url has an option that is not known, or not of its scheme")

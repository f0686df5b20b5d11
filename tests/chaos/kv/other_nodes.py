"""Another node, whose folder this one reads through its page server, is killed and frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from pydantic import SecretStr

from kv_store import (
    BreakerConfig,
    KVStoreConfig,
    PageStore,
    PeersTierConfig,
    SsdTierConfig,
    ValkeyTierConfig,
    build_page_store,
)
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey_admin import stored_pages
from tests.chaos.kv.pages import (
    LAYOUT,
    PATIENT_S,
    LastResortCounter,
    Verdict,
    load,
    make_chains,
    save,
)
from tests.chaos.kv.processes import event_row

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]

_NUM_CHAINS = 8
_NUM_EVENTS = 2
_PAUSE_S = 0.5


def break_other_nodes(root: Path) -> dict[str, Any]:
    """SIGKILL and a start on the same folder; SIGSTOP, longer than an operation may take."""
    started = time.monotonic()
    verdict = Verdict()
    chains = make_chains(_NUM_CHAINS)
    server = EmbeddedValkey(64 << 20)
    server.start()
    is_over = threading.Event()
    has_recovered = True
    try:
        with (
            redis.Redis.from_url(server.url) as admin,
            closing(build_page_store(_config(server.url, root / "ours"), LAYOUT)) as store,
            LastResortCounter(verdict),
        ):

            def load_on() -> None:
                while not is_over.is_set():
                    for chain in chains:
                        load(store, chain, verdict)

            threads = [threading.Thread(target=load_on) for _ in range(2)]
            for number in range(_NUM_EVENTS):
                with _other_node(server.url, root / "theirs") as node:
                    # Valkey forgets; what is then served comes from the other node.
                    _forget_pages(admin)
                    has_recovered &= _serves_all(store, chains, verdict)
                    if number == 0:
                        for thread in threads:
                            thread.start()
                    time.sleep(_PAUSE_S)
                    node.send_signal(signal.SIGSTOP)
                    time.sleep(3 * _PAUSE_S)
                    node.send_signal(signal.SIGCONT)
                    has_recovered &= _serves_all(store, chains, verdict)
                    node.kill()
                time.sleep(_PAUSE_S)
            is_over.set()
            for thread in threads:
                thread.join()
    finally:
        is_over.set()
        server.stop()
    return event_row(
        "kill -9 and SIGSTOP of another node", 2 * _NUM_EVENTS, verdict, has_recovered, started
    )


def _serves_all(store: PageStore, chains: list[list[Any]], verdict: Verdict) -> bool:
    """Whether, within a deadline, the other node gives every chain whole."""
    deadline = time.monotonic() + PATIENT_S
    for chain in chains:
        while load(store, chain, verdict) < len(chain):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    return store.stats().tiers["peers"].num_hits > 0


def _forget_pages(admin: redis.Redis) -> None:
    if names := list(stored_pages(admin)):
        admin.unlink(*names)


@contextmanager
def _other_node(url: str, root: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.kv.other_nodes", str(root)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CHAOS_VALKEY_URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as node:
        try:
            if node.stdout is None or node.stdout.readline().strip() != "written":
                raise RuntimeError("the other node did not start")
            yield node
        finally:
            node.kill()


def _config(url: str, root: Path) -> KVStoreConfig:
    return KVStoreConfig(
        tiers=(
            ValkeyTierConfig(url=SecretStr(url), operation_timeout_s=_PAUSE_S),
            SsdTierConfig(root=root, budget_bytes=64 << 20, segment_bytes=1 << 20),
            PeersTierConfig(operation_timeout_s=_PAUSE_S),
        ),
        breaker=BreakerConfig(open_s=0.05, max_open_s=0.2),
        moves=None,  # else this node would soon have all pages itself
    )


def _live(url: str, root: Path) -> None:
    """The other node: writes all chains, then serves them until its input ends or it is killed."""
    verdict = Verdict()
    with closing(build_page_store(_config(url, root), LAYOUT)) as store:
        for chain in make_chains(_NUM_CHAINS):
            save(store, chain, verdict)
            store.flush(PATIENT_S)
        sys.stdout.write("written\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    _live(os.environ["CHAOS_VALKEY_URL"], Path(sys.argv[1]))

"""Processes that die or stop: a Valkey under load, and a writer in the middle of its writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from pydantic import SecretStr

from kv_store import (
    BreakerConfig,
    KVStoreConfig,
    PageStore,
    SsdTierConfig,
    ValkeyTierConfig,
    build_page_store,
)
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from tests.chaos.kv.pages import (
    LAYOUT,
    PATIENT_S,
    LastResortCounter,
    Verdict,
    load,
    make_chains,
    save,
    work,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_store import PageKey

ROOT = Path(__file__).parents[3]

_NUM_CHAINS = 24
_NUM_EVENTS = 3
_NUM_CRASHES = 6
_PAUSE_S = 0.5
_WRITER_CHAINS = 120


def kill_valkey(root: Path) -> dict[str, Any]:
    """SIGKILL under load, a while without it, and a restart, again and again."""

    def event(server: EmbeddedValkey, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)
        server.start()

    return _under_load("kill -9 of Valkey, restart", event, root)


def freeze_valkey(root: Path) -> dict[str, Any]:
    """SIGSTOP under load, longer than an operation may take, and SIGCONT, again and again."""

    def event(server: EmbeddedValkey, pid: int) -> None:
        del server
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3 * _PAUSE_S)
        os.kill(pid, signal.SIGCONT)

    return _under_load("frozen Valkey (SIGSTOP)", event, root)


def _under_load(
    name: str, event: Callable[[EmbeddedValkey, int], None], root: Path
) -> dict[str, Any]:
    started = time.monotonic()
    verdict = Verdict()
    chains = make_chains(_NUM_CHAINS)
    server = EmbeddedValkey(64 << 20)
    server.start()
    config = KVStoreConfig(
        tiers=(
            ValkeyTierConfig(url=SecretStr(server.url), operation_timeout_s=_PAUSE_S),
            SsdTierConfig(root=root, budget_bytes=8 << 20, segment_bytes=1 << 20),
        ),
        breaker=BreakerConfig(open_s=0.05, max_open_s=0.2),
    )
    is_over = threading.Event()
    try:
        with closing(build_page_store(config, LAYOUT)) as store, LastResortCounter(verdict):

            def load_on(seed: int) -> None:
                while not is_over.is_set():
                    seed += 1
                    work(store, chains, verdict, seed)

            threads = [threading.Thread(target=load_on, args=(n << 20,)) for n in range(2)]
            for thread in threads:
                thread.start()
            has_recovered = True
            for _ in range(_NUM_EVENTS):
                event(server, _pid(server))
                has_recovered &= _serves_from(store, "valkey", chains[0], verdict)
            is_over.set()
            for thread in threads:
                thread.join()
    finally:
        is_over.set()
        server.stop()
    return event_row(name, _NUM_EVENTS, verdict, has_recovered, started)


def _serves_from(store: PageStore, tier: str, keys: list[PageKey], verdict: Verdict) -> bool:
    """Whether, within a deadline, the tier gives a whole chain again."""
    deadline = time.monotonic() + PATIENT_S
    while time.monotonic() < deadline:
        save(store, keys, verdict)
        hits = store.stats().tiers[tier].num_hits
        is_whole = load(store, keys, verdict) == len(keys)
        if is_whole and store.stats().tiers[tier].num_hits >= hits + len(keys):
            return True
        time.sleep(0.02)
    return False


def _pid(server: EmbeddedValkey) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("server")["process_id"])


def kill_writers(root: Path) -> dict[str, Any]:
    """SIGKILL of a process in mid-write; the next ones use its folder and all it had written."""
    started = time.monotonic()
    verdict = Verdict()
    chains = make_chains(_WRITER_CHAINS)
    num_found: list[int] = []
    with LastResortCounter(verdict):
        for crash in range(_NUM_CRASHES):
            _write_until_killed(root, crash)
            with closing(build_page_store(_disk_config(root), LAYOUT)) as store:
                num_found.append(sum(load(store, chain, verdict) for chain in chains))
    folders = [path.name for path in root.iterdir()]
    # Each crash may tear what was being written; all before it is found again.
    is_kept = all(later > 0 for later in num_found) and num_found == sorted(num_found)
    row = event_row(
        "kill -9 of a writer in mid-write",
        _NUM_CRASHES,
        verdict,
        is_kept and folders == ["replica-0"],
        started,
    )
    return row | {"pages_found_after_each": num_found}


def _write_until_killed(root: Path, crash: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.kv.processes", str(root), str(crash)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        try:
            if writer.stdout is None or writer.stdout.readline().strip() != "writing":
                raise RuntimeError("the writer did not start")
            time.sleep(0.02 * (1 + crash % 3))  # when it hits does not matter, only that it differs
        finally:
            writer.kill()


def _disk_config(root: Path) -> KVStoreConfig:
    return KVStoreConfig(
        tiers=(SsdTierConfig(root=root, budget_bytes=256 << 20, segment_bytes=2 << 20),)
    )


def _write(root: Path, crash: int) -> None:
    """The process that is killed: writes a share of the chains, over and over, then idles."""
    verdict = Verdict()
    with closing(build_page_store(_disk_config(root), LAYOUT)) as store:
        chains = make_chains(_WRITER_CHAINS)
        share = len(chains) // _NUM_CRASHES
        mine = chains[crash * share : (crash + 1) * share]
        for number, chain in enumerate(mine):
            save(store, chain, verdict)
            store.flush(PATIENT_S)
            if number == 1:
                sys.stdout.write("writing\n")
                sys.stdout.flush()
        time.sleep(PATIENT_S)


def event_row(
    name: str, num_events: int, verdict: Verdict, has_recovered: bool, started: float
) -> dict[str, Any]:
    """Of the report."""
    return {
        "event": name,
        "events": num_events,
        "pages_asked": verdict.num_asked,
        "pages_served": verdict.num_served,
        "wrong_pages": verdict.num_wrong,
        "raised": verdict.num_raised,
        "recovered": has_recovered,
        "seconds": round(time.monotonic() - started, 1),
        "errors": verdict.errors,
    }


if __name__ == "__main__":
    _write(Path(sys.argv[1]), int(sys.argv[2]))

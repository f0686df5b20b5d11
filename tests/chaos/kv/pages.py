"""Small pages whose bytes follow from their keys, so that each one served can be judged."""

from __future__ import annotations

import logging
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kv_store import Namespace
from tests.kv_pages import TENANT_KEY, make_layout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from kv_store import LoadedPages, PageKey, PageStore

LAYOUT = make_layout()
PAGES_PER_CHAIN = 32
_LOADS_IN_FLIGHT = 8
_SAVES = 3
PATIENT_S = 30.0


def make_chains(num_chains: int, fidelity: str = "exact") -> list[list[PageKey]]:
    """Chains that share no page."""
    namespace = Namespace(TENANT_KEY, LAYOUT, fidelity)
    num_tokens = PAGES_PER_CHAIN * LAYOUT.page_tokens
    return [
        namespace.chain(range(start, start + num_tokens))
        for start in range(0, num_chains * num_tokens, num_tokens)
    ]


def page_of(key: PageKey) -> NDArray[np.uint8]:
    """The one right content of a page."""
    repeats = -(-LAYOUT.nbytes // len(key.page_hash))
    return np.frombuffer(key.page_hash * repeats, dtype=np.uint8)[: LAYOUT.nbytes].copy()


@dataclass(slots=True)
class Verdict:
    """What became of the pages.

    Attributes:
        num_wrong: pages served whose bytes are not those of their key.
        num_raised: operations that raised, and faults that reached the store's own last resort.
    """

    num_saved: int = 0
    num_asked: int = 0
    num_served: int = 0
    num_wrong: int = 0
    num_raised: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def raised(self, error: object) -> None:
        """Note one."""
        with self.lock:
            self.num_raised += 1
            if len(self.errors) < 5:
                self.errors.append(repr(error))


def be_quiet() -> None:
    """Every fault is logged, as it should be; here they would hide the tables."""
    logging.getLogger("kv_store").addHandler(logging.NullHandler())
    logging.getLogger("kv_store").propagate = False


class LastResortCounter(logging.Handler):
    """Counts what the store logs as an error: an exception that no tier's guard has caught."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(logging.ERROR)
        self._verdict = verdict

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        self._verdict.raised(record.getMessage())

    def __enter__(self) -> LastResortCounter:
        logging.getLogger("kv_store").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("kv_store").removeHandler(self)


def save(store: PageStore, keys: Sequence[PageKey], verdict: Verdict) -> None:
    """Queue pages."""
    try:
        for key in keys:
            store.save(key, page_of(key))
            verdict.num_saved += 1
    except Exception as error:  # noqa: BLE001 - counted: nothing may reach the engine
        verdict.raised(error)


def load(
    store: PageStore, keys: Sequence[PageKey], verdict: Verdict, timeout_s: float = PATIENT_S
) -> int:
    """Load a chain and judge each page; how many came."""
    return load_all(store, [keys], verdict, timeout_s)


def load_all(
    store: PageStore,
    chains: Sequence[Sequence[PageKey]],
    verdict: Verdict,
    timeout_s: float = PATIENT_S,
) -> int:
    """Load chains at the same time and judge each page; how many came."""
    loads = [store.load(keys, timeout_s=timeout_s) for keys in chains]
    return sum(_judge(load, keys, verdict) for load, keys in zip(loads, chains, strict=True))


def _judge(load: Future[LoadedPages], keys: Sequence[PageKey], verdict: Verdict) -> int:
    try:
        pages = load.result(timeout=2 * PATIENT_S).pages
    except Exception as error:  # noqa: BLE001 - counted: nothing may reach the engine
        verdict.raised(error)
        return 0
    num_wrong = sum(
        not np.array_equal(page, page_of(key)) for key, page in zip(keys, pages, strict=False)
    )
    with verdict.lock:
        verdict.num_asked += len(keys)
        verdict.num_served += len(pages)
        verdict.num_wrong += num_wrong + max(0, len(pages) - len(keys))
    return len(pages)


def work(store: PageStore, chains: list[list[PageKey]], verdict: Verdict, seed: int) -> None:
    """Save the beginnings of some chains, and ask for some whole ones."""
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    for chain in rng.choices(chains, k=_SAVES):
        save(store, chain[: rng.randint(1, PAGES_PER_CHAIN)], verdict)
    load_all(store, rng.choices(chains, k=_LOADS_IN_FLIGHT), verdict)


def recovers(store: PageStore, chains: list[list[PageKey]], verdict: Verdict, rounds: int) -> bool:
    """Whether, with no fault any more, every page can be written and read again."""
    return all(_is_held(store, chain, verdict, rounds) for chain in chains)


def _is_held(store: PageStore, chain: list[PageKey], verdict: Verdict, rounds: int) -> bool:
    """Whether a chain comes back whole; pages that a fault had swapped are first found out."""
    for _ in range(rounds):
        save(store, chain, verdict)
        store.flush(PATIENT_S)
        if load(store, chain, verdict) == len(chain):
            return True
    return False

"""Pages of the real SGLang on a CPU, shared through the KV tier by engines of different processes.

``make test-sglang`` runs it. Each engine is what a target replica holds; that a cluster's replicas
share pages as well is shown by ``test_serving``.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import subprocess
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from deployments.engine.prefixes import report
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.routing import PrefixAwareRouter
from deployments.tokenizer import Tokenizer
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey_admin import admin_clients, read_page, stored_pages
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.exactness import Reference, assert_same_text
from tests.integration.cluster.cluster_process import ROOT
from tests.integration.test_torch_engine_parity import QUESTIONS
from tests.ray_cluster import wait_until
from tests.sglang.dense_model import write_dense_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PYTHON = os.environ.get("SGLANG_PYTHON")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="make test-sglang runs it"),
]

PATIENT_S = 420
PAGE = 64
NUM_PAGES = 5
OURS, THEIRS = 1, 2


class Engine:
    """One engine and its processes."""

    def __init__(self, settings: dict[str, Any], place: Path) -> None:
        path = place / "settings.json"
        path.write_text(json.dumps(settings))
        shims = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        self._process = subprocess.Popen(
            [str(PYTHON), "-m", "tests.sglang.kv_replica", str(path)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *shims])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._answers: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._answer() == "ready"

    def do(self, what: str, **more: Any) -> Any:
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        return self._answer()

    def ask(
        self,
        prompt: list[int],
        tenant: int = OURS,
        *,
        is_drafted: bool = False,
        **sampling: float,
    ) -> dict[str, Any]:
        answer: dict[str, Any] = self.do(
            "ask",
            prompt=prompt,
            tenant=tenant,
            is_drafted=is_drafted,
            sampling={"max_tokens": 16} | sampling,
        )
        return answer

    def do_when_idle(self, what: str) -> None:
        """SGLang refuses while it is still copying pages."""
        wait_until(lambda: self.do(what) is True, timeout_s=PATIENT_S, what=what)

    def num_saved(self) -> int:
        return int(self.do("stats")["num_saved"])

    def close(self) -> None:
        self._process.stdin.close()
        try:
            assert self._process.wait(PATIENT_S) == 0
        finally:
            self._process.kill()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(EOFError("the engine has ended"))

    def _answer(self) -> Any:
        answer = self._answers.get(timeout=PATIENT_S)
        if isinstance(answer, Exception):
            raise answer
        return answer


class FreshRouter(PrefixAwareRouter):
    """Only what the choice needs of the base class: queue lengths, all equal."""

    def __init__(self) -> None:
        self.initialize_state()

    @property
    def replica_queue_len_cache(self) -> Any:
        return SimpleNamespace(get=lambda _: 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    """Each a little longer than its pages; no two begin with the same one."""
    tokenizer = Tokenizer.load(folder)
    text = " ".join(QUESTIONS)
    tokens = tokenizer.encode(text * 4)
    return [tokens[start:][: NUM_PAGES * PAGE + 7] for start in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(512 << 20)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def settings(folder: Path, server: EmbeddedValkey) -> dict[str, Any]:
    tier = {
        "kind": "valkey",
        "url": server.url,
        "connect_timeout_s": 10,
        "operation_timeout_s": 10,
    }
    return {
        "engine": {
            "kind": "sglang",
            "model": str(folder),
            "max_model_len": 1024,
            "num_pages": 64,
            "max_num_seqs": 2,
            "kv_load_timeout_s": 30,
            # Without a local drafter, so that every accepted token is one of the pool's.
            "speculation": {"local_drafter": "none"},
            "sglang": {"attention_backend": "torch_native"},
        },
        "kv": {"codec": "lossless", "tiers": [tier]},
    }


def names(server: EmbeddedValkey) -> set[bytes]:
    with admin_clients(ValkeyAddress(url=server.url), 30.0) as (client,):
        return set(stored_pages(client))


@pytest.fixture(scope="module")
def written(
    settings: dict[str, Any],
    server: EmbeddedValkey,
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """What an engine answered that computed everything itself; its pages are in the tier now.

    Those of the second prompt are damaged.
    """
    engine = Engine(settings, tmp_path_factory.mktemp("writer"))
    try:
        answers = []
        held: set[bytes] = set()
        for number, prompt in enumerate(prompts):
            answers.append(engine.ask(prompt))
            wait_until(
                lambda: len(names(server)) == (number + 1) * NUM_PAGES,  # noqa: B023
                timeout_s=PATIENT_S,
                what="pages in the tier",
            )
            new = names(server) - held
            held |= new
            if number == 1:
                damage(server, new)
        wait_until(
            lambda: engine.num_saved() == len(held), timeout_s=PATIENT_S, what="the count of pages"
        )
    finally:
        engine.close()
    return answers


def damage(server: EmbeddedValkey, pages: set[bytes]) -> None:
    """One bit of each."""
    with admin_clients(ValkeyAddress(url=server.url), 30.0) as (client,):
        for name in pages:
            blob = bytearray(read_page(client, name))
            blob[-1] ^= 1
            client.set(name, bytes(blob))


@pytest.fixture(scope="module")
def reader(
    written: list[dict[str, Any]],
    settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    """Another engine, whose own memory is empty; it has a draft pool, too."""
    del written
    engine = Engine(settings | {"is_drafted": True}, tmp_path_factory.mktemp("reader"))
    yield engine
    engine.close()


def assert_as_written(prompt: list[int], expected: dict[str, Any], actual: dict[str, Any]) -> None:
    assert len(expected["token_ids"]) > 4
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=16, seed=0, temperature=0.0),
    )
    texts = {"r": expected["token_ids"]}, {"r": actual["token_ids"]}
    assert_same_text(Reference(default_cache_dir()), [request], *texts)


def test_pages_of_one_engine_are_loaded_by_another(
    prompts: list[list[int]], written: list[dict[str, Any]], reader: Engine
) -> None:
    assert [answer["num_cached"] for answer in written] == [0] * len(prompts)
    answer = reader.ask(prompts[0])
    assert answer["num_cached"] == answer["num_tier_cached"] == NUM_PAGES * PAGE
    assert_as_written(prompts[0], written[0], answer)
    reader.do_when_idle("flush")
    again = reader.ask(prompts[0])
    assert again["num_tier_cached"] == NUM_PAGES * PAGE
    assert again["token_ids"] == answer["token_ids"]
    wait_until(
        lambda: reader.do("stats")["num_loaded"] == 2 * NUM_PAGES,
        timeout_s=PATIENT_S,
        what="the count of pages",
    )


def test_a_router_knows_what_an_engine_holds_until_it_is_flushed(
    prompts: list[list[int]], reader: Engine
) -> None:
    """The router of an ingress that has sent nothing yet."""

    def rank(prompt: list[int], tenant: int = OURS) -> list[str]:
        """The replicas that Serve tries first."""
        replicas: Any = [
            SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=told)
            for name, told in {
                "one": reader.do("held"),
                "other": report([], is_complete=True),
            }.items()
        ]
        request = GenerationRequest(
            request_id="r",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=1, seed=0),
            tenant=f"tenant-{tenant}",
        )
        pending: Any = SimpleNamespace(args=[request], routing_context=SimpleNamespace())
        ranks = asyncio.run(FreshRouter().choose_replicas(replicas, pending))
        return [replica.replica_id.unique_id for replica in ranks[0]]

    reader.ask(prompts[0])
    wait_until(lambda: rank(prompts[0]) == ["one"], timeout_s=PATIENT_S, what="its pages")
    assert rank(prompts[0][: 2 * PAGE]) == ["one"]
    assert len(rank(prompts[0], THEIRS)) == 2
    assert len(rank(prompts[3])) == 2
    reader.do_when_idle("flush")
    wait_until(lambda: len(rank(prompts[0])) == 2, timeout_s=PATIENT_S, what="no pages")
    assert reader.do("held") == report([], is_complete=True)


def test_damaged_pages_are_computed(
    prompts: list[list[int]], written: list[dict[str, Any]], reader: Engine
) -> None:
    answer = reader.ask(prompts[1])
    assert answer["num_cached"] == 0
    assert_as_written(prompts[1], written[1], answer)
    (tier,) = reader.do("stats")["tiers"].values()
    wait_until(
        lambda: reader.do("stats")["tiers"][tier["name"]]["num_corrupt"] == NUM_PAGES,
        timeout_s=PATIENT_S,
        what="the count of damaged pages",
    )


def test_a_tenant_does_not_meet_the_pages_of_another(
    prompts: list[list[int]], written: list[dict[str, Any]], reader: Engine, server: EmbeddedValkey
) -> None:
    before = names(server)
    reader.do_when_idle("flush")
    answer = reader.ask(prompts[0], tenant=THEIRS)
    assert answer["num_cached"] == 0
    assert_as_written(prompts[0], written[0], answer)
    wait_until(
        lambda: len(names(server) - before) >= NUM_PAGES, timeout_s=PATIENT_S, what="own pages"
    )
    reader.do_when_idle("flush")
    assert reader.ask(prompts[0], tenant=THEIRS)["num_tier_cached"] == NUM_PAGES * PAGE


def test_the_name_of_a_page_depends_on_whom_it_belongs_to(reader: Engine) -> None:
    owners = [(None, None), (None, "one"), (None, "two"), ("one", None), ("one", "one")]
    names = [reader.do("name", extra_key=key, cache_salt=salt) for key, salt in owners]
    assert len(set(names)) == len(owners)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}],
    ids=["greedy", "sampled"],
)
def test_a_text_whose_prompt_is_loaded_is_drafted_for(
    reader: Engine, server: EmbeddedValkey, folder: Path, sampling: dict[str, float]
) -> None:
    line = f"Round {len(sampling)}: red, green, blue, yellow, red, green, blue, yellow. "
    prompt = Tokenizer.load(folder).encode(line * 40)[: NUM_PAGES * PAGE + 7]
    before = names(server)
    plain = reader.ask(prompt, max_tokens=40, **sampling)
    assert (plain["num_cached"], plain["num_accepted_pool"]) == (0, 0)
    wait_until(
        lambda: len(names(server) - before) >= NUM_PAGES,
        timeout_s=PATIENT_S,
        what="pages in the tier",
    )
    drafted: dict[str, Any] = {}

    def is_drafted() -> bool:
        """The link may come up too late for the first text."""
        reader.do_when_idle("flush")
        drafted.update(reader.ask(prompt, is_drafted=True, max_tokens=40, **sampling))
        assert drafted["num_tier_cached"] == NUM_PAGES * PAGE
        return bool(drafted["num_accepted_pool"])

    wait_until(is_drafted, timeout_s=PATIENT_S, what="accepted tokens of the pool")
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": 40, "seed": 0, "temperature": 0.0} | sampling),
    )
    texts = {"r": plain["token_ids"]}, {"r": drafted["token_ids"]}
    assert_same_text(Reference(default_cache_dir()), [request], *texts)


def test_the_tier_is_detached_and_attached_while_the_engine_runs(
    prompts: list[list[int]], written: list[dict[str, Any]], reader: Engine
) -> None:
    reader.do_when_idle("flush")
    reader.do_when_idle("detach")
    apart = reader.ask(prompts[2])
    assert apart["num_cached"] == 0
    assert_as_written(prompts[2], written[2], apart)
    reader.do_when_idle("flush")
    reader.do_when_idle("attach")
    joined = reader.ask(prompts[2])
    assert joined["num_tier_cached"] == NUM_PAGES * PAGE
    assert_as_written(prompts[2], written[2], joined)


def test_a_cleared_tier_is_empty(
    prompts: list[list[int]], written: list[dict[str, Any]], reader: Engine, server: EmbeddedValkey
) -> None:
    assert names(server)
    reader.do_when_idle("flush")
    assert reader.do("clear")
    assert not names(server)
    answer = reader.ask(prompts[2])
    assert answer["num_cached"] == 0
    assert_as_written(prompts[2], written[2], answer)


def test_an_engine_whose_valkey_is_killed_goes_on(
    prompts: list[list[int]], written: list[dict[str, Any]], reader: Engine, server: EmbeddedValkey
) -> None:
    wait_until(
        lambda: len(names(server)) >= NUM_PAGES, timeout_s=PATIENT_S, what="pages in the tier"
    )
    server.stop()
    reader.do_when_idle("flush")
    for prompt, expected in zip(prompts[2:], written[2:], strict=True):
        answer = reader.ask(prompt)
        assert answer["num_cached"] == 0
        assert_as_written(prompt, expected, answer)
    assert reader.ask(prompts[3])["num_cached"] == NUM_PAGES * PAGE  # in its own memory

"""The router's choice, without a cluster: candidates in, ranks out."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.request_router.request_router import RequestRouter

from deployments.engine.embedding import EmbeddingRequest
from deployments.engine.prefixes import Report, prefix_names, report
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.ping import Ping
from deployments.routing import PrefixAwareRouter

PAGE = tuple(range(64))


def replica(name: str, told: Report | None = None) -> Any:
    return SimpleNamespace(
        replica_id=SimpleNamespace(unique_id=name),
        max_ongoing_requests=8,
        routing_stats=told or {},
    )


class Router(PrefixAwareRouter):
    """Only what the choice needs of the base class: queue lengths."""

    def __init__(self, **settings: Any) -> None:
        self.queues: dict[str, int] = {}
        self.initialize_state(**settings)

    @property
    def replica_queue_len_cache(self) -> Any:
        return SimpleNamespace(get=lambda replica_id: self.queues.get(replica_id.unique_id))


def pending(request: object, created_at: float | None = None) -> Any:
    return SimpleNamespace(
        args=[request],
        created_at=time.time() if created_at is None else created_at,
        routing_context=SimpleNamespace(should_backoff=False),
    )


def request(tokens: tuple[int, ...] = PAGE, avoid: tuple[str, ...] = ()) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=1, seed=1),
        avoid_replicas=avoid,
    )


class Waiting(Router):
    """With what the base class keeps of replicas and of calls that wait."""

    def __init__(self, *replicas: Any, **queues: int) -> None:
        super().__init__()
        self.queues = queues
        self._replicas_list = list(replicas)
        self._pending_requests_to_fulfill: deque[Any] = deque()
        self.recorded: list[Any] = []

    @property
    def _replica_queue_len_cache(self) -> Any:
        return self.replica_queue_len_cache

    def _record_queue_wait_time(self, pending_request: Any) -> None:
        self.recorded.append(pending_request)


def choose(router: Router, replicas: list[Any], item: Any) -> list[list[str]]:
    ranks = asyncio.run(router.choose_replicas(replicas, item))
    return [[chosen.replica_id.unique_id for chosen in rank] for rank in ranks]


A, B, C = replica("a"), replica("b"), replica("c")


def test_an_unknown_prompt_goes_to_the_shorter_of_two_queues() -> None:
    first, everyone = choose(Router(), [A, B, C], pending(request()))
    assert len(first) == 2
    assert everyone == ["a", "b", "c"]


def test_a_known_prompt_goes_back_to_its_replica() -> None:
    router = Router()
    router.on_request_routed(pending(request()), B.replica_id, None)
    assert choose(router, [A, B, C], pending(request((*PAGE, 5, 6))))[0] == ["b"]
    assert choose(router, [A, C], pending(request()))[0] != ["b"]
    embedded = EmbeddingRequest(request_id="e", prompt_token_ids=PAGE, avoid_replicas=("a",))
    assert choose(router, [A, B, C], pending(embedded))[0] == ["b"]
    router.on_request_routed(pending(embedded), A.replica_id, None)
    assert "a" not in choose(router, [A, B, C], pending(embedded))[-1]


@pytest.mark.parametrize(("queue", "kept"), [(4, True), (5, False)])
def test_a_busy_replica_is_left_although_it_knows_the_prompt(queue: int, *, kept: bool) -> None:
    router = Router(max_queue_excess=4)
    router.on_request_routed(pending(request()), B.replica_id, None)
    router.queues = {"a": 0, "b": queue, "c": 9}
    assert (choose(router, [A, B, C], pending(request()))[0] == ["b"]) is kept


def test_avoided_replicas_are_the_last_resort() -> None:
    router = Router(avoid_grace_s=2.0)
    router.on_request_routed(pending(request()), A.replica_id, None)
    assert {
        name for rank in choose(router, [A, B], pending(request(avoid=("a",)))) for name in rank
    } == {"b"}
    assert not any(choose(router, [A], pending(request(avoid=("a",)))))
    waited = pending(request(avoid=("a",)), created_at=time.time() - 3)
    assert choose(router, [A], waited)[0] == ["a"]


def test_a_health_check_asks_a_replica_that_it_has_not_asked() -> None:
    item = pending(Ping(avoid_replicas=("a", "c")))
    assert choose(Router(), [A, B, C], item)[0] == ["b"]


@pytest.fixture
def by_base(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether calls that the base class's tasks had to route were tried before."""
    routed: list[bool] = []

    async def choose_replica(_: Any, pending_request: Any, *, is_retry: bool = False) -> str:
        assert pending_request is not None
        routed.append(is_retry)
        return "routed by a task"

    monkeypatch.setattr(RequestRouter, "_choose_replica_for_request", choose_replica)
    return routed


def at_once(router: Waiting, item: Any, *, is_retry: bool = False) -> Any:
    return asyncio.run(router._choose_replica_for_request(item, is_retry=is_retry))


def test_a_call_that_nobody_is_before_goes_to_a_free_replica_at_once(by_base: list[bool]) -> None:
    router = Waiting(A, B, a=3, b=1)
    item = pending(request())
    assert at_once(router, item) is B
    assert router.recorded == [item]
    router.on_request_routed(item, A.replica_id, None)
    assert at_once(router, pending(request())) is A
    router.queues["a"] = 7
    assert at_once(router, pending(request())) is B
    assert by_base == []


@pytest.mark.parametrize("queues", [{}, {"a": 1}, {"a": 8, "b": 8}], ids=str)
def test_unknown_and_full_replicas_are_left_to_serve(
    queues: dict[str, int], by_base: list[bool]
) -> None:
    router = Waiting(A, B, **queues)
    assert at_once(router, pending(request())) == "routed by a task"
    assert by_base == [False]
    assert router.recorded == []


def test_nobody_is_overtaken(by_base: list[bool]) -> None:
    router = Waiting(A, a=0)
    ended, waits = (SimpleNamespace(future=SimpleNamespace(done=lambda it=it: it)) for it in (1, 0))
    router._pending_requests_to_fulfill.extend((ended, waits))
    assert at_once(router, pending(request())) == "routed by a task"
    router._pending_requests_to_fulfill.remove(waits)
    router._pending_requests_to_fulfill.append(ended)
    assert at_once(router, pending(request())) is A
    assert at_once(router, pending(request()), is_retry=True) == "routed by a task"
    assert by_base == [False, True]


def test_an_avoided_replica_waits_for_another_one(by_base: list[bool]) -> None:
    router = Waiting(A, a=0)
    assert at_once(router, pending(request(avoid=("a",)))) == "routed by a task"
    assert by_base == [False]


def test_waiting_calls_back_off() -> None:
    item = pending(request())
    choose(Router(), [A], item)
    assert item.routing_context.should_backoff


def test_other_calls_are_balanced_too() -> None:
    item = pending("ping")
    item.args = []
    assert len(choose(Router(), [A, B, C], item)[0]) == 2


def test_a_prompt_goes_where_its_beginning_is_reported() -> None:
    router = Router()
    held = prefix_names(request().tenant, PAGE)
    one = replica("a", report([], is_complete=True))
    other = replica("b", report(held, is_complete=True))
    assert choose(router, [one, other], pending(request()))[0] == ["b"]
    router.queues = {"a": 0, "b": 5}
    assert choose(router, [one, other], pending(request()))[0] != ["b"]
    router.queues = {"a": 3, "b": 2}
    both = [replica(name, report(held, is_complete=True)) for name in ("a", "b")]
    assert choose(router, both, pending(request()))[0] == ["b"]


def test_a_prompt_does_not_go_back_to_a_replica_that_has_forgotten_it() -> None:
    router = Router(unconfirmed_s=0.0)
    router.on_request_routed(pending(request()), A.replica_id, None)
    assert choose(router, [A, B], pending(request()))[0] == ["a"]
    one, other = (replica(name, report([], is_complete=True)) for name in ("a", "b"))
    assert sorted(choose(router, [one, other], pending(request()))[0]) == ["a", "b"]

"""What a target replica makes of its prefill pool, and of everything that may go wrong there."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.config import PrefillConfig, TracingConfig
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.types import (
    CaptureSpec,
    GenerationRequest,
    GenerationUsage,
    Prefilled,
    SamplingParams,
)
from deployments.prefill_metrics import PrefillMetrics
from deployments.prefill_pool import PrefillPool
from deployments.tracing import Tracing
from tests.fakes_async import eventually
from tests.fakes_metrics import Exporter, exporter_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.prefill_pool import PromptAhead

PROMPT = tuple(range(1000))
WHOLE = Prefilled(num_prompt_tokens=960, num_cached_tokens=64, num_shared_tokens=960)


class Call:
    """What a streaming handle call returns."""

    def __init__(self, items: AsyncIterator[Prefilled | None]) -> None:
        self._items = items
        self.is_cancelled = False
        self.has_ended = False

    async def __aiter__(self) -> AsyncIterator[Prefilled | None]:
        async for item in self._items:
            yield item
        self.has_ended = True

    def cancel(self) -> None:
        self.is_cancelled = True


class Pool:
    """The handle of a prefill pool; every call gets the next answer, the last one for ever.

    None is an answer that does not come; without replicas nobody takes a prompt.
    """

    def __init__(self, *answers: Prefilled | Exception | None) -> None:
        self._answers = list(answers)
        self.asked: list[GenerationRequest] = []
        self.calls: list[Call] = []
        self.options_: dict[str, object] = {}
        self.has_replicas = True

    def options(self, **options: object) -> Pool:
        self.options_ = options
        return self

    def remote(self, request: GenerationRequest) -> Call:
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

        async def come() -> AsyncIterator[Prefilled | None]:
            if not self.has_replicas:
                await asyncio.Event().wait()
            if not isinstance(answer, BackPressureError):
                yield None
            if answer is None:
                await asyncio.Event().wait()
            if isinstance(answer, Exception):
                raise answer
            yield answer

        self.calls.append(Call(come()))
        return self.calls[-1]


class Engine:
    """Knows how much is cached."""

    def __init__(self) -> None:
        self.num_cached = 0
        self.refuses: Exception | None = None
        self.num_questions = 0

    async def count_cached(self, request: GenerationRequest, timeout_s: float) -> int:
        self.num_questions += 1
        if self.refuses is not None:
            raise self.refuses
        return self.num_cached

    async def prefill(self, request: GenerationRequest) -> Prefilled:
        raise NotImplementedError


class Target:
    """One target replica's view, with a clock that a test moves."""

    def __init__(self, pool: Pool, exporter: Exporter, **settings: Any) -> None:
        self.now = 100.0
        self.engine = Engine()
        self.exporter = exporter
        self.pool = PrefillPool(
            pool,
            PrefillConfig(**({"min_tokens": 500} | settings)),
            self.engine,
            Tracing(TracingConfig(), "test"),
            PrefillMetrics(),
            clock=lambda: self.now,
        )

    async def ahead(self, request: GenerationRequest, num_backlog: int = 0) -> PromptAhead:
        async with asyncio.timeout(60):
            return await self.pool.ahead(request, num_backlog)

    def told(self, metric: str) -> dict[str, float]:
        """A counter by its label."""
        found = self.exporter.scrape().items()
        return {key[1]: value for key, value in found if key[0] == f"{metric}_total"}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return exporter_for(monkeypatch)


def make_request(num_tokens: int = 1000, **changes: Any) -> GenerationRequest:
    sampling = {"max_tokens": 8, "seed": 1} | changes.pop("sampling", {})
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=PROMPT[:num_tokens],
        sampling=SamplingParams(**sampling),
        **changes,
    )


def usage(num_cached: int, num_tier: int, num_prompt: int = 1000) -> GenerationUsage:
    return GenerationUsage(
        num_prompt_tokens=num_prompt,
        num_output_tokens=8,
        num_cached_tokens=num_cached,
        num_tier_cached_tokens=num_tier,
    )


async def test_a_long_prompt_is_computed_ahead_under_a_name_of_its_own(exporter: Exporter) -> None:
    pool = Pool(WHOLE)
    target = Target(pool, exporter, timeout_s=7)
    request = make_request(
        deadline=time.time() + 100,
        avoid_replicas=("t1",),
        tenant="acme",
        tenant_key=b"k" * 32,
        priority=-3,
    )
    await target.ahead(request)
    await target.ahead(request)
    assert pool.options_ == {"stream": True, "method_name": "prefill"}
    assert all(call.has_ended and not call.is_cancelled for call in pool.calls)
    first, second = pool.asked
    assert (first.prompt_token_ids, first.tenant_key) == (PROMPT, request.tenant_key)
    assert (first.tenant, first.priority, first.avoid_replicas) == ("acme", -3, ())
    assert len({request.request_id, first.request_id, second.request_id}) == 3
    assert first.deadline is not None
    assert first.deadline <= time.time() + 7
    assert target.told("prefill_prompts") == {"sent": 2}
    assert target.told("prefill_calls") == {"loadable": 2}
    assert exporter.scrape()["prefill_tokens_total",] == 2 * (960 - 64)
    assert exporter.scrape()["prefill_seconds_count", "loadable"] == 2
    assert ("prefill_in_flight",) not in exporter.scrape(), "none is there now"


async def test_half_of_a_request_s_time_is_left_to_do_without(exporter: Exporter) -> None:
    pool = Pool(WHOLE)
    target = Target(pool, exporter, timeout_s=10_000)
    await target.ahead(make_request(deadline=time.time() + 2000))
    [asked] = pool.asked
    assert asked.deadline is not None
    assert time.time() < asked.deadline <= time.time() + 1000


async def test_who_waited_for_another_s_prompt_teaches_no_cost(exporter: Exporter) -> None:
    shared = Prefilled(num_prompt_tokens=960, num_cached_tokens=896, num_shared_tokens=960)
    target = Target(Pool(shared, WHOLE), exporter)
    await target.ahead(make_request())
    assert target.pool.costs.pool.at(target.now) is None
    await target.ahead(make_request())
    assert target.pool.costs.pool.at(target.now) is not None


async def test_short_prompts_are_not_even_looked_up(exporter: Exporter) -> None:
    target = Target(Pool(WHOLE), exporter)
    await target.ahead(make_request(499))
    assert target.engine.num_questions == 0
    assert target.told("prefill_prompts") == {"short": 1}


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (make_request(sampling={"num_prompt_logprobs": 0}), "unused"),
        (make_request(capture=CaptureSpec(layers=(1,))), "unused"),
        (make_request(capture=CaptureSpec(layers=(1,), includes_prompt=False)), "sent"),
        (make_request(sampling={"num_prompt_logprobs": 0}, resumed_output_ids=(7,)), "sent"),
        (make_request(400, resumed_output_ids=PROMPT[:200]), "sent"),
    ],
)
async def test_only_requests_that_take_pages_from_a_cache_are_sent(
    exporter: Exporter, request_: GenerationRequest, reason: str
) -> None:
    target = Target(Pool(WHOLE), exporter)
    await target.ahead(request_)
    assert target.told("prefill_prompts") == {reason: 1}


async def test_a_prompt_of_which_most_is_cached_stays(exporter: Exporter) -> None:
    pool = Pool(WHOLE)
    target = Target(pool, exporter)
    target.engine.num_cached = 512
    ahead = await target.ahead(make_request())
    assert (pool.asked, target.told("prefill_prompts")) == ([], {"cached": 1})
    assert ahead.usage(usage(512, 512)) == usage(512, 512)


async def test_what_the_replica_itself_refuses_is_not_sent(exporter: Exporter) -> None:
    pool = Pool(WHOLE)
    target = Target(pool, exporter)
    target.engine.refuses = RequestRejectedError("no", "prompt")
    with pytest.raises(RequestRejectedError):
        await target.ahead(make_request())
    assert pool.asked == []


def wrapped(error: Exception) -> RayTaskError:
    """As Ray's own transport gives it."""
    return RayTaskError("prefill", "traceback", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Prefilled(num_prompt_tokens=960), "in_vain"),
        (ActorUnavailableError("gone", None), "lost"),
        (EngineDeadError("dead", "p1"), "lost"),
        (wrapped(EngineDeadError("dead", "p1")), "lost"),
        (BackPressureError(1, 2), "overloaded"),
        (EngineOverloadedError("full"), "overloaded"),
        (DeadlineExceededError("late"), "timeout"),
        (RequestRejectedError("no"), "failed"),
        (ValueError("what?"), "failed"),
        (None, "timeout"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
async def test_whatever_goes_wrong_the_request_goes_on_and_the_pool_is_left_alone(
    exporter: Exporter, answer: Prefilled | Exception | None, outcome: str
) -> None:
    pool = Pool(answer)
    target = Target(pool, exporter, timeout_s=0.01)
    for _ in range(5):
        ahead = await target.ahead(make_request())
        ahead.first_token()
        assert ahead.usage(usage(0, 0)) == usage(0, 0)
    assert target.told("prefill_calls") == {outcome: 3}
    assert target.told("prefill_prompts") == {"sent": 3, "failing": 2}
    assert all(call.is_cancelled for call in pool.calls) == (answer is None)
    target.now += 2.0
    await target.ahead(make_request())
    assert target.told("prefill_prompts") == {"sent": 4, "failing": 2}, "one is let through"
    await target.ahead(make_request())
    assert target.told("prefill_prompts") == {"sent": 4, "failing": 3}


async def test_a_tier_that_takes_nothing_new_is_a_failure_of_the_pool(exporter: Exporter) -> None:
    target = Target(
        Pool(Prefilled(num_prompt_tokens=960, num_cached_tokens=128, num_shared_tokens=128)),
        exporter,
    )
    target.engine.num_cached = 128
    for _ in range(5):
        await target.ahead(make_request())
    assert target.told("prefill_calls") == {"in_vain": 3}
    assert target.told("prefill_prompts") == {"sent": 3, "failing": 2}


async def test_a_pool_without_room_is_not_waited_for(exporter: Exporter) -> None:
    pool = Pool(WHOLE)
    pool.has_replicas = False
    target = Target(pool, exporter, timeout_s=10_000, queue_timeout_s=0.01)
    for _ in range(5):
        await target.ahead(make_request())
    assert target.told("prefill_calls") == {"overloaded": 3}
    assert target.told("prefill_prompts") == {"sent": 3, "failing": 2}
    assert all(call.is_cancelled for call in pool.calls)
    pool.has_replicas = True
    target.now += 2.0
    await target.ahead(make_request())
    assert target.told("prefill_calls") == {"overloaded": 3, "loadable": 1}


async def test_a_pool_that_answers_again_is_used_again(exporter: Exporter) -> None:
    gone = ActorUnavailableError("gone", None)
    target = Target(Pool(gone, gone, gone, WHOLE), exporter)
    for _ in range(3):
        await target.ahead(make_request())
    target.now += 2.0
    for _ in range(4):
        await target.ahead(make_request())
    assert target.told("prefill_calls") == {"lost": 3, "loadable": 4}


async def test_a_cancelled_request_is_cancelled_at_the_pool(exporter: Exporter) -> None:
    pool = Pool(None)
    target = Target(pool, exporter, max_in_flight=2)
    waiting = [asyncio.create_task(target.ahead(make_request())) for _ in range(2)]
    await eventually(lambda: len(pool.calls) == 2)
    await target.ahead(make_request())
    assert target.told("prefill_prompts") == {"sent": 2, "busy": 1}
    for task in waiting:
        task.cancel()
    for task in waiting:
        with pytest.raises(asyncio.CancelledError):
            await task
    assert all(call.is_cancelled for call in pool.calls)
    assert target.told("prefill_calls") == {"cancelled": 2}
    again = asyncio.create_task(target.ahead(make_request()))
    await eventually(lambda: len(pool.calls) == 3)
    again.cancel()


async def test_a_cancelled_probe_does_not_keep_the_pool_shut_for_ever(exporter: Exporter) -> None:
    gone = ActorUnavailableError("gone", None)
    pool = Pool(gone, gone, gone, None, WHOLE)
    target = Target(pool, exporter)
    for _ in range(3):
        await target.ahead(make_request())
    target.now += 2.0
    probe = asyncio.create_task(target.ahead(make_request()))
    await eventually(lambda: len(pool.calls) == 4)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    target.now += 60.0
    await target.ahead(make_request())
    assert target.told("prefill_calls") == {"lost": 3, "cancelled": 1, "loadable": 1}


async def test_the_account_is_that_of_a_cluster_without_a_pool(exporter: Exporter) -> None:
    target = Target(Pool(WHOLE), exporter)
    target.engine.num_cached = 128
    ahead = await target.ahead(make_request())
    assert ahead.usage(usage(960, 832)) == usage(128, 128)
    target.engine.num_cached = 0
    ahead = await target.ahead(make_request())
    assert ahead.usage(usage(960, 960)) == usage(64, 64), "the pool had a page of its own"
    ahead = await target.ahead(make_request())
    assert ahead.usage(usage(0, 0)) == usage(0, 0), "nothing came"


async def test_pages_that_a_failing_pool_had_written_are_charged(exporter: Exporter) -> None:
    target = Target(Pool(ValueError("in the middle")), exporter)
    ahead = await target.ahead(make_request())
    assert ahead.usage(usage(512, 512)) == usage(0, 0)


async def test_the_pool_is_left_once_it_was_seen_to_take_longer(exporter: Exporter) -> None:
    pool = Pool(WHOLE)
    target = Target(pool, exporter, max_slowdown=2.0)

    async def computed_here(seconds: float, num_backlog: int = 0) -> None:
        target.engine.num_cached = 999
        ahead = await target.ahead(make_request(), num_backlog)
        target.now += seconds
        ahead.first_token()
        ahead.usage(usage(0, 0))
        target.engine.num_cached = 0

    async def sent(at_pool_s: float, loading_s: float) -> bool:
        num_asked = len(pool.asked)
        real = pool.remote

        def remote(request: GenerationRequest) -> Call:
            target.now += at_pool_s
            return real(request)

        pool.remote = remote  # type: ignore[method-assign]
        ahead = await target.ahead(make_request())
        pool.remote = real  # type: ignore[method-assign]
        target.now += loading_s
        ahead.first_token()
        ahead.usage(usage(960, 960))
        return len(pool.asked) > num_asked

    await computed_here(2.0, num_backlog=1000)
    assert target.pool.costs.here.at(target.now) == pytest.approx(0.001)
    assert await sent(0.896, 0.096)
    assert target.pool.costs.pool.at(target.now) == pytest.approx(0.001)
    assert target.pool.costs.load.at(target.now) == pytest.approx(0.0001)
    assert await sent(8.0, 0.1)
    assert not await sent(0.1, 0.1)
    assert target.told("prefill_prompts") == {"cached": 1, "sent": 2, "cost": 1}
    told = exporter.scrape()
    assert told["prefill_token_cost_seconds", "here"] > 0
    assert told["prefill_token_cost_seconds", "pool"] > told["prefill_token_cost_seconds", "load"]

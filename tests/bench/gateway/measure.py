"""Requests through every gateway in turn, round by round, so that all see the same machine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.load.arrivals import Segment, arrival_times
from cluster.load.generator import LoadGenerator
from cluster.load.workload import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cluster.load.surfaces import Surface
    from tests.bench.gateway.processor_time import ProcessorTime

_TIMEOUT_S = 30.0
_MAX_IN_FLIGHT = 256
_NUM_WARM = 50
PROMPT = (
    "Explain in a few sentences why the sky is blue at noon and red in the evening, and what "
    "would be different on a planet whose air is a hundred times as thick as ours."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is asked.

    Attributes:
        rounds: in each of which everybody is asked.
        rate: requests per second, as a Poisson process.
        seconds: of them, per gateway and round.
        num_streams: long answers one after the other, per gateway and round.
        num_items: tokens of a long answer.
    """

    rounds: int
    rate: float
    seconds: float
    num_streams: int
    num_items: int


@dataclass(slots=True, kw_only=True)
class Row:
    """What one way to ask took; seconds.

    Attributes:
        first_s: from sending to the first piece, of answers with one token.
        whole_s: and to the end.
        item_s: per item behind the first one, of each long answer; empty where answers come whole.
        cpu_s: processor seconds per request by process, of the gateway and of everything behind it.
        item_cpu_s: and per item of long answers.
        errors: of requests that failed.
    """

    first_s: list[float]
    whole_s: list[float]
    item_s: list[float]
    cpu_s: dict[str, float]
    item_cpu_s: dict[str, float]
    errors: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to ask.

    Attributes:
        surface: of it.
        streams: whether answers come item by item.
        processor_time: of the processes that serve it.
        pid: of the first of these; None if it is the caller itself.
    """

    surface: Surface
    streams: bool
    processor_time: ProcessorTime
    pid: int | None = None


async def measure(
    ways: Mapping[str, Way], plan: Plan, give_turn: Callable[[int | None], None]
) -> dict[str, Row]:
    """Ask in every way.

    Args:
        ways: by name.
        plan: how much.
        give_turn: called with the ``pid`` of the way that is asked next.

    Returns:
        By name of the way.
    """
    rows = {
        name: Row(first_s=[], whole_s=[], item_s=[], cpu_s={}, item_cpu_s={}, errors=[])
        for name in ways
    }
    for number in range(plan.rounds):
        for name, way in ways.items():
            give_turn(way.pid)
            await _ask_in_turn(way.surface, 1, _NUM_WARM)
            await _short(way, plan, number, rows[name])
            if way.streams:
                await _long(way, plan, rows[name])
    for way in ways.values():
        give_turn(way.pid)
        await way.surface.close()
    return rows


async def _short(way: Way, plan: Plan, number: int, row: Row) -> None:
    segment = Segment(plan.rate, plan.rate, plan.seconds)
    times = arrival_times([segment], burstiness=1.0, seed=number)
    schedule = [_request(at_s, 1) for at_s in times]
    generator = LoadGenerator([way.surface], timeout_s=_TIMEOUT_S, max_in_flight=_MAX_IN_FLIGHT)
    before = way.processor_time.read()
    await generator.run(schedule)
    _add(row.cpu_s, way.processor_time.read() - before, plan.rounds * len(schedule))
    for outcome in generator.outcomes:
        if outcome.error is None:
            row.first_s.append(outcome.event_s[0] - outcome.sent_s)
            row.whole_s.append(outcome.ended_s - outcome.sent_s)
        else:
            row.errors.append(outcome.error)


async def _long(way: Way, plan: Plan, row: Row) -> None:
    short = await _ask_in_turn(way.surface, 1, plan.num_streams)
    before = way.processor_time.read()
    long = await _ask_in_turn(way.surface, plan.num_items, plan.num_streams)
    spent = way.processor_time.read() - before
    num_behind = plan.num_items - 1
    _add(row.item_cpu_s, spent, plan.rounds * plan.num_streams * plan.num_items)
    row.item_s += [(one - other) / num_behind for one, other in zip(long, short, strict=True)]


def _add(into: dict[str, float], spent: Mapping[str, float], divisor: int) -> None:
    for name, seconds in spent.items():
        into[name] = into.get(name, 0.0) + seconds / divisor


async def _ask_in_turn(surface: Surface, num_tokens: int, count: int) -> list[float]:
    """Seconds of requests that each wait for the one before."""
    loop, taken = asyncio.get_running_loop(), []
    for _ in range(count):
        started = loop.time()
        async for _ in surface.ask(_request(0.0, num_tokens), _TIMEOUT_S):
            pass
        taken.append(loop.time() - started)
    return taken


def _request(at_s: float, num_tokens: int) -> LoadRequest:
    return LoadRequest(at_s=at_s, prompt=PROMPT, max_tokens=num_tokens, ignore_eos=True)


def percentile(values: Iterable[float], cut: float) -> float:
    """A value that occurred."""
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * cut / 100)]

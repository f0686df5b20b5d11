"""Open-loop: what a slow, refusing or broken server does to a run."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import RequestError
from cluster.load.generator import LoadGenerator
from cluster.load.run import LoadTest
from cluster.load.summary import Slo
from cluster.load.surfaces import BrokenError, Counts, Piece, RefusedError
from cluster.load.workload import LoadRequest

COUNTS = Counts(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=1)


class Scripted:
    """Answers each request with its prompt's script."""

    def __init__(self, name="scripted", slow=0):
        self.name = name
        self.num_open = self.most_open = 0
        self._all_slow_ones = asyncio.Barrier(slow) if slow else None

    async def ask(self, request, timeout_s):
        del timeout_s
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            match request.prompt:
                case "slow":
                    await self._all_slow_ones.wait()
                case "hang":
                    await asyncio.Event().wait()
                case "refuse":
                    raise RefusedError("429: full")
                case "break":
                    yield Piece(has_text=True)
                    raise BrokenError("gone")
                case "cut":
                    yield Piece(has_text=True)
                    return
            yield Piece(has_text=request.prompt != "silent")
            yield Piece(has_text=False, counts=COUNTS)
        finally:
            self.num_open -= 1

    async def close(self):
        pass


def schedule(*prompts, gap_s=0.0):
    return [
        LoadRequest(at_s=index * gap_s, prompt=prompt, max_tokens=2, ignore_eos=False)
        for index, prompt in enumerate(prompts)
    ]


async def outcomes(requests, *surfaces, timeout_s=60.0, max_in_flight=100):
    generator = LoadGenerator(surfaces, timeout_s=timeout_s, max_in_flight=max_in_flight)
    await generator.run(requests)
    assert generator.num_in_flight == 0
    assert [outcome.index for outcome in generator.outcomes] == list(range(len(requests)))
    return generator.outcomes


async def test_a_slow_server_holds_no_arrival_up():
    server = Scripted(slow=10)  # answers none before all have arrived
    found = await outcomes(schedule(*["slow"] * 10, gap_s=0.001), server)
    assert server.most_open == 10
    assert all(outcome.ending == "complete" for outcome in found)
    assert all(outcome.sent_s >= outcome.due_s for outcome in found)


@pytest.mark.parametrize(
    ("prompt", "ending", "error"),
    [
        ("refuse", "rejected", "429: full"),
        ("break", "failed", "gone"),
        ("hang", "failed", "no end within 1 s"),
        ("cut", "failed", "the stream ended without usage"),
    ],
)
async def test_every_request_ends_once_and_says_why(prompt, ending, error):
    server = Scripted()
    timeout_s = 1.0 if prompt == "hang" else 60.0
    fine, other, last = await outcomes(
        schedule("fine", prompt, "fine"), server, timeout_s=timeout_s
    )
    assert (other.ending, other.error) == (ending, error)
    assert fine.ending == last.ending == "complete"
    assert server.num_open == 0


async def test_counts_and_times_are_kept():
    (found,) = await outcomes(schedule("fine"), Scripted())
    counts = (found.num_prompt_tokens, found.num_output_tokens, found.num_cached_tokens)
    assert counts == (3, 2, 1)
    assert found.due_s <= found.sent_s <= found.event_s[0] <= found.ended_s
    assert found.ttft_s == found.event_s[0] - found.due_s


async def test_an_answer_of_no_text_is_an_answer():
    (found,) = await outcomes(schedule("silent"), Scripted())
    assert found.ending == "complete"
    assert found.event_s == [found.ended_s]


async def test_beyond_the_limit_nothing_is_sent():
    server = Scripted(slow=2)
    found = await outcomes(schedule(*["slow"] * 5), server, max_in_flight=2)
    assert server.most_open == 2
    assert [outcome.ending for outcome in found] == ["complete"] * 2 + ["failed"] * 3
    assert found[4].error == "not sent: 2 are in flight"


async def test_surfaces_take_turns():
    found = await outcomes(schedule(*["fine"] * 4), Scripted("a"), Scripted("b"))
    assert [outcome.surface for outcome in found] == ["a", "b", "a", "b"]


async def stopped_run(*prompts):
    """A run that is stopped once everything that hangs is in flight."""
    server, stop = Scripted(), asyncio.Event()
    test = LoadTest(
        schedule=schedule(*prompts), surfaces=[server], slo=Slo(), timeout_s=600, max_in_flight=99
    )
    num_hanging = prompts.count("hang")

    def on_progress(now):
        if (now.num_due, now.num_in_flight) == (len(prompts), num_hanging):
            stop.set()

    answer = await test.run(on_progress, stop)
    assert server.num_open == 0
    return answer


async def test_a_stopped_run_reports_what_has_ended():
    report, found = await stopped_run("fine", "hang", "refuse", "hang")
    assert [each.ending for each in found] == ["complete", "unfinished", "rejected", "unfinished"]
    assert (report["all"]["num_requests"], report["all"]["num_failed"]) == (2, 1)
    assert report["stopped"]["num_broken_off"] == 2
    assert report["stopped"]["num_never_due"] == 0


async def test_a_run_that_ends_was_not_stopped():
    surfaces = [Scripted()]
    test = LoadTest(
        schedule=schedule("fine"), surfaces=surfaces, slo=Slo(), timeout_s=60, max_in_flight=1
    )
    report, _ = await test.run(lambda _: None)
    assert report["stopped"] is None


async def test_a_run_stopped_before_any_end_says_so():
    with pytest.raises(RequestError, match="before any request had ended"):
        await stopped_run("hang")

import random
from itertools import pairwise

import pytest

from deployments.engine.speculation.fake_transport import FakeNetwork, Faults
from deployments.engine.speculation.pool_link import LinkLimits, LinkState, PoolLink, Round
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.speculator_stats import PoolCounters
from deployments.engine.speculation.types import Ask, DraftTree
from protos import draft_pb2
from tests.fakes_speculation import IDENTITY, VOCAB_SIZE, random_text, spec_of

LIMITS = LinkLimits(backoff_s=1.0, max_backoff_s=8.0, max_frame_tokens=50, idle_close_s=5.0)
ASK = Ask(2, 1)


class Bench:
    def __init__(self, max_session_tokens: int = 1_000) -> None:
        self.network = FakeNetwork(seed=0)
        self.streams = []
        self.max_session_tokens = max_session_tokens
        self.listen()
        self.connect = self.network.connector(IDENTITY)
        rng = random.Random(0)  # noqa: S311
        self.link = PoolLink("e", LIMITS, rng, self.network.clock())

    def listen(self) -> None:
        self.network.listen("e", IDENTITY, self.streams.append, self.max_session_tokens)

    def dial(self) -> bool:
        now = self.network.clock()
        if not self.link.wants_transport(now):
            return False
        self.link.adopt(self.connect("e"), now)
        return True

    def add(self, session_id: int, length: int = 10) -> PoolSession:
        session = PoolSession(spec_of(session_id, random_text(session_id, length)), VOCAB_SIZE)
        self.link.add(session)
        return session

    def send(self, *sessions: PoolSession) -> None:
        rounds = [Round(session, session.spec.token_ids, DraftTree(), ASK) for session in sessions]
        self.link.send(rounds, self.network.clock())

    def sent(self) -> list:
        return [frame for frame, _ in self.streams[-1].receive()]


def test_dials_only_for_sessions_and_opens_them_in_the_first_frame():
    bench = Bench()
    assert not bench.dial()
    sessions = [bench.add(1), bench.add(2)]
    assert bench.dial()
    assert not bench.dial()
    assert not bench.link.check(0.0)
    assert bench.link.state is LinkState.UP
    bench.send(*sessions)
    [frame] = bench.sent()
    assert [opened.session for opened in frame.opens] == [1, 2]
    assert [(commit.session, commit.round) for commit in frame.commits] == [(1, 1), (2, 1)]


def test_the_time_for_an_answer_is_without_its_way():
    bench = Bench()
    session = bench.add(1)
    bench.dial()
    bench.link.check(0.0)
    counters = PoolCounters()
    told = []
    for turn in range(100):
        now = float(turn)
        ask = ASK._replace(within_s=0.030)
        bench.link.send([Round(session, session.spec.token_ids, DraftTree(), ask)], now)
        [commit] = bench.sent()[-1].commits
        told.append(commit.within_us)
        table = draft_pb2.Table(session=1, epoch=1, round=commit.round, base_len=commit.base_len)
        counters.pool_batch_time_s = 0.015  # of the 20 ms that pass until the table comes
        bench.link._on_table(table, now + 0.020, counters)
    assert told[0] == 30_000
    assert told == sorted(told, reverse=True)
    assert told[-1] == pytest.approx(25_000, abs=10)


def test_a_frame_holds_no_more_text_than_allowed_and_rounds_go_first():
    bench = Bench()
    old, new = bench.add(1), bench.add(2, length=120)
    bench.dial()
    bench.link.check(0.0)
    bench.send(old)
    bench.sent()
    for _ in range(3):
        bench.send(new, old)
    frames = bench.sent()
    assert frames[0].commits[0].session == 1
    texts = [
        sum(len(opened.token_ids) for opened in frame.opens)
        + sum(len(commit.committed) for commit in frame.commits)
        for frame in frames
    ]
    assert texts == [50, 50, 20]
    assert new.num_sent == 120


def test_a_session_is_closed_once_and_only_if_the_drafter_knows_it():
    bench = Bench()
    known, unknown = bench.add(1), bench.add(2)
    bench.dial()
    bench.link.check(0.0)
    bench.send(known)
    bench.link.remove(1, 0.0)
    bench.link.remove(2, 0.0)
    bench.link.remove(3, 0.0)
    for _ in range(3):
        bench.send()
    closes = [close.session for frame in bench.sent() for close in frame.closes]
    assert closes == [1]
    assert not unknown.is_live


def test_a_drafter_that_is_out_of_reach_is_dialled_often_enough_to_be_back_in_five_seconds():
    bench = Bench()
    bench.link = PoolLink("e", LinkLimits(), random.Random(0), 0.0)  # noqa: S311
    bench.add(1)
    bench.network.faults = Faults(min_delay_s=1e9, max_delay_s=1e9)  # nothing comes back
    dialled_at = []
    while bench.network.clock() < 300:
        if bench.dial():
            dialled_at.append(bench.network.clock())
        bench.link.check(bench.network.clock())
        bench.network.advance(0.05)
    assert max(later - earlier for earlier, later in pairwise(dialled_at)) < 4
    bench.network.faults = Faults()
    while not bench.dial():
        bench.link.check(bench.network.clock())
        bench.network.advance(0.05)
    bench.link.check(bench.network.clock())
    assert bench.link.state is LinkState.UP


def test_backoff_doubles_and_starts_again_after_success():
    bench = Bench()
    session = bench.add(1)
    bench.network.kill("e")
    waits = []
    for _ in range(6):
        start = bench.network.clock()
        while not bench.dial():
            bench.network.advance(0.01)
        waits.append(bench.network.clock() - start)
        assert bench.link.check(bench.network.clock())
        assert not bench.link.check(bench.network.clock())
    assert waits[0] == 0.0
    for wait, most in zip(waits[1:], [1, 2, 4, 8, 8], strict=True):
        assert most / 2 - 0.02 <= wait <= most + 0.02
    bench.listen()
    bench.network.advance(10.0)
    assert bench.dial()
    bench.link.check(bench.network.clock())
    bench.send(session)
    assert session.is_live
    bench.network.kill("e")
    assert bench.link.check(bench.network.clock())
    assert not session.is_live
    bench.network.advance(1.01)
    assert bench.link.wants_transport(bench.network.clock())


def test_a_refused_link_stays_refused():
    bench = Bench()
    bench.add(1)
    other = FakeNetwork(seed=0)
    other.listen("e", IDENTITY, bench.streams.append, 10)
    stranger = type(IDENTITY)(model="other", vocab_size=1, vocab_digest="")
    bench.connect = other.connector(stranger)
    bench.dial()
    assert bench.link.check(0.0)
    assert bench.link.state is LinkState.REFUSED
    bench.network.advance(100.0)
    assert not bench.dial()
    assert not bench.link.check(100.0)


def test_texts_the_drafter_cannot_hold_are_not_sent():
    bench = Bench(max_session_tokens=20)
    short, long = bench.add(1, length=10), bench.add(2, length=20)
    bench.dial()
    bench.link.check(0.0)
    bench.send(short, long)
    assert short.is_live
    assert not long.is_live


def test_idle_after_a_while_without_sessions():
    bench = Bench()
    assert not bench.link.is_idle(4.9)
    assert bench.link.is_idle(5.0)
    bench.add(1)
    assert not bench.link.is_idle(100.0)
    bench.link.remove(1, 100.0)
    assert not bench.link.is_idle(104.9)
    assert bench.link.is_idle(105.0)


def test_frames_without_room_are_counted():
    bench = Bench()
    session = bench.add(1)
    bench.dial()
    bench.link.check(0.0)
    for _ in range(70):
        bench.send(session)
    counters = PoolCounters()
    bench.link.receive(counters)
    bench.link.receive(counters)
    assert counters.num_frames_dropped == 6

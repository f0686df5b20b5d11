import math

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.engine.speculation import draft_session
from deployments.engine.speculation.canary import DrafterRole
from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.canary import CanaryDrafter
from deployments.engine.speculation.fake_transport import FakeNetwork
from deployments.engine.speculation.types import OutcomeRow
from protos import draft_pb2
from tests.fakes_speculation import IDENTITY, VOCAB_SIZE

Dropped = draft_pb2.Dropped
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class CountingDrafter(Drafter):
    """Proposes the text's length as the bonus token; fails on demand."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.fanouts: list[int] = []
        self.is_broken = False
        self.rows: list[OutcomeRow] | None = None

    def propose(self, queries):
        if self.is_broken:
            raise ZeroDivisionError
        self.batches.append(len(queries))
        self.fanouts.extend(query.fanout for query in queries)
        if self.rows is not None:
            return [self.rows for _ in queries]
        return [[OutcomeRow(-1, len(query.token_ids), (1,))] for query in queries]


class Bench:
    def __init__(self, **limits) -> None:
        self.drafter = CountingDrafter()
        self.network = FakeNetwork(seed=0, capacity=1_000)
        self.service = DraftService(
            self.drafter,
            vocab_size=VOCAB_SIZE,
            limits=DraftLimits(**limits),
            clock=self.network.clock,
        )
        self.network.listen("e", IDENTITY, self.service.accept, 1_000)
        self.target = self.connect()

    def connect(self):
        return self.network.connector(IDENTITY)("e")

    def send(self, *, opens=(), commits=(), closes=(), target=None) -> None:
        (target or self.target).send(
            draft_pb2.TargetFrame(opens=opens, commits=commits, closes=closes)
        )

    def answers(self, target=None) -> draft_pb2.DraftFrame:
        self.service.step()
        merged = draft_pb2.DraftFrame()
        for frame, _ in (target or self.target).receive():
            merged.MergeFrom(frame)
        return merged

    def drops(self, target=None) -> list[tuple[int, int]]:
        return [(drop.session, drop.reason) for drop in self.answers(target).drops]


def opened(
    session: int, tokens=(1, 2, 3), epoch: int = 1, traceparent: str = "", tenant: str = ""
) -> draft_pb2.Open:
    return draft_pb2.Open(
        session=session,
        epoch=epoch,
        tenant=tenant,
        token_ids=tokens,
        sampling=draft_pb2.Sampling(top_p=1.0),
        traceparent=traceparent,
    )


def commit(session: int, round_: int, base_len: int, tokens=(), epoch: int = 1, **fields):
    asked = {"num_draft_tokens": 2, "fanout": 2} | fields
    return draft_pb2.Commit(
        session=session, epoch=epoch, round=round_, base_len=base_len, committed=tokens, **asked
    )


def test_one_table_per_session_for_the_newest_round():
    bench = Bench()
    bench.send(opens=[opened(1), opened(2)], commits=[commit(1, 1, 3), commit(2, 1, 3)])
    bench.send(commits=[commit(1, 2, 5, [4, 5])])
    tables = bench.answers().tables
    assert {(t.session, t.round, t.base_len, t.rows[0].bonus_token_id) for t in tables} == {
        (1, 2, 5, 5),
        (2, 1, 3, 3),
    }
    assert bench.drafter.batches == [2]
    stats = bench.service.stats()
    assert (stats.num_superseded, stats.num_tables, stats.num_pending) == (1, 2, 0)


def test_a_gap_is_reported_and_repaired_by_an_overlap():
    bench = Bench()
    bench.send(opens=[opened(1)], commits=[commit(1, 2, 6, [6])])
    [resync] = bench.answers().resyncs
    assert (resync.session, resync.round, resync.have_len) == (1, 2, 3)
    bench.send(commits=[commit(1, 3, 5, [3, 4, 5])])
    [table] = bench.answers().tables
    assert (table.round, table.base_len) == (3, 5)


def test_a_snapshot_is_of_one_moment():
    bench = Bench(max_session_tokens=3)
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3)])
    bench.answers()
    before = bench.service.stats()
    assert type(before.num_superseded) is int
    bench.send(commits=[commit(1, 2, 4, [4])])
    bench.answers()
    assert before.num_dropped_by_reason == {}
    assert bench.service.stats().num_dropped_by_reason == {"too_long": 1}


def test_old_rounds_and_old_epochs_are_ignored():
    bench = Bench()
    bench.send(opens=[opened(1, epoch=2)], commits=[commit(1, 5, 4, [4], epoch=2)])
    assert len(bench.answers().tables) == 1
    bench.send(
        opens=[opened(1, (9, 9, 9), epoch=1), opened(1, (9, 9, 9), epoch=2)],
        commits=[commit(1, 5, 4, [4], epoch=2), commit(1, 4, 4, [4], epoch=2), commit(1, 9, 9)],
    )
    answer = bench.answers()
    assert (len(answer.tables), len(answer.drops), len(answer.resyncs)) == (0, 0, 0)
    assert bench.service.stats().num_stale_commits == 3
    bench.send(closes=[draft_pb2.Close(session=1, epoch=1)])
    bench.answers()
    assert bench.service.stats().num_sessions == 1


@pytest.mark.parametrize(
    "bad",
    [
        commit(1, 2, 2),
        commit(1, 2, 4, [9, 9]),
        commit(1, 2, 1, [1, 2, 3]),
        commit(1, 2, 4, [VOCAB_SIZE]),
        commit(1, 2, 4, [4], in_flight_token_ids=[1], in_flight_parents=[5]),
    ],
    ids=["shorter", "rewrites", "negative start", "foreign token", "broken tree"],
)
def test_a_malformed_session_is_quarantined_alone(bad):
    bench = Bench()
    bench.send(opens=[opened(1), opened(2)])
    bench.send(commits=[bad, commit(2, 1, 3)])
    answer = bench.answers()
    assert [(drop.session, drop.reason) for drop in answer.drops] == [(1, Dropped.MALFORMED)]
    assert [table.session for table in answer.tables] == [2]
    assert bench.target.is_alive
    bench.send(opens=[opened(1, epoch=2)], commits=[commit(1, 1, 3, epoch=2)])
    assert [table.session for table in bench.answers().tables] == [1]


def test_unknown_sessions_are_named():
    bench = Bench()
    bench.send(opens=[opened(2)], commits=[commit(1, 1, 3), commit(2, 1, 3, epoch=2)])
    assert bench.drops() == [(1, Dropped.UNKNOWN), (2, Dropped.UNKNOWN)]


def test_a_failing_drafter_costs_its_batch_only():
    bench = Bench()
    bench.drafter.is_broken = True
    bench.send(opens=[opened(1), opened(2)], commits=[commit(1, 1, 3)])
    assert bench.drops() == [(1, Dropped.DRAFTER_FAILED)]
    assert bench.service.stats().num_drafter_failures == 1
    bench.drafter.is_broken = False
    bench.send(commits=[commit(2, 1, 3)])
    assert [table.session for table in bench.answers().tables] == [2]


@pytest.mark.parametrize(
    "row",
    [
        OutcomeRow(0, 1, ()),
        OutcomeRow(-2, 1, ()),
        OutcomeRow(None, 1, ()),
        OutcomeRow(-1, VOCAB_SIZE, ()),
        OutcomeRow(-1, 1, (-1,)),
        OutcomeRow(-1, 1.0, ()),
        OutcomeRow(-1, 1, ("1",)),
        OutcomeRow(-1, 1, (), (0.5, 0.5)),
        OutcomeRow(-1, 1, (), (1.5,)),
        OutcomeRow(-1, 1, (), (float("nan"),)),
    ],
)
def test_a_row_that_answers_nothing_is_left_out_and_counted(row):
    bench = Bench()
    bench.drafter.rows = [row, OutcomeRow(-1, 2, ())]
    bench.send(opens=[opened(1), opened(2)], commits=[commit(1, 1, 3), commit(2, 1, 3)])
    answer = bench.answers()
    assert [[row.bonus_token_id for row in table.rows] for table in answer.tables] == [[2], [2]]
    assert not answer.drops
    stats = bench.service.stats()
    assert (stats.num_bad_rows, stats.num_rows, stats.num_drafter_failures) == (2, 2, 0)


@pytest.mark.parametrize(
    "answer", [None, [], [None], [[]] * 2, [["row"]], [[OutcomeRow(-1, 1, None)]]]
)
def test_a_drafter_that_answers_nonsense_counts_as_failing(answer):
    bench = Bench()
    bench.drafter.propose = lambda queries: answer
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3)])
    assert bench.drops() == [(1, Dropped.DRAFTER_FAILED)]
    assert bench.service.stats().num_drafter_failures == 1


def test_a_table_holds_no_more_than_was_asked_and_the_chances_of_that():
    bench = Bench()
    bench.drafter.rows = [OutcomeRow(-1, 1, (2, 3, 4), (1.0, 0.8, 0.6, 0.4))]
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3)])
    [table] = bench.answers().tables
    assert list(table.rows[0].draft_token_ids) == [2, 3]
    assert table.rows[0].chances == bytes([255, 204, 153])


def test_the_drafter_is_told_until_when_its_answer_counts():
    bench = Bench()
    told = []
    propose = bench.drafter.propose

    def listening(queries):
        told.extend(query.answer_by for query in queries)
        return propose(queries)

    bench.drafter.propose = listening
    bench.send(opens=[opened(1), opened(2)], commits=[commit(1, 1, 3, within_us=20_000)])
    bench.send(commits=[commit(2, 1, 3)])
    bench.answers()
    assert told == [pytest.approx(bench.network.clock() + 0.02), math.inf]


def test_the_session_unused_for_longest_is_evicted():
    bench = Bench(max_sessions=2)
    bench.send(opens=[opened(1), opened(2)])
    bench.send(commits=[commit(1, 1, 3)])
    bench.answers()
    bench.send(opens=[opened(3)])
    assert bench.drops() == [(2, Dropped.EVICTED)]
    assert bench.service.stats().num_sessions == 2


def test_a_tenant_with_many_sessions_evicts_its_own():
    bench = Bench(max_sessions=3)
    bench.send(opens=[opened(1, tenant="few")])
    bench.send(opens=[opened(number, tenant="many") for number in range(2, 6)])
    assert bench.drops() == [(2, Dropped.EVICTED), (3, Dropped.EVICTED)]


def test_a_tenant_with_many_questions_does_not_keep_another_waiting():
    bench = Bench(max_batch_sessions=2)
    bench.send(
        opens=[opened(number, tenant="many") for number in range(8)] + [opened(8, tenant="few")],
        commits=[commit(number, 1, 3, fanout=4) for number in range(9)],
    )
    assert [table.session for table in bench.answers().tables] == [0, 8]
    assert bench.drafter.fanouts == [1, 4]


def test_a_successor_that_fails_to_open_costs_sessions_and_no_more():
    class Refuser(CountingDrafter):
        def open(self, session):
            if len(session.token_ids) > 3:
                raise ZeroDivisionError

    bench = Bench()
    bench.send(opens=[opened(1), opened(2)], commits=[commit(1, 1, 4, [4])])
    bench.answers()
    bench.service.replace_drafter(Refuser())
    assert bench.drops() == [(1, Dropped.DRAFTER_FAILED)]
    bench.send(commits=[commit(2, 1, 3)])
    assert [table.session for table in bench.answers().tables] == [2]


def test_idle_sessions_expire():
    bench = Bench(idle_timeout_s=10.0)
    bench.send(opens=[opened(1), opened(2)])
    bench.answers()
    bench.network.advance(6.0)
    bench.send(commits=[commit(2, 1, 3)])
    bench.answers()
    bench.network.advance(6.0)
    assert bench.drops() == [(1, Dropped.EXPIRED)]


def test_long_texts_are_refused():
    bench = Bench(max_session_tokens=5)
    bench.send(opens=[opened(1), opened(2, [1] * 6)])
    bench.send(commits=[commit(1, 1, 6, [4, 5, 6])])
    assert bench.drops() == [(2, Dropped.TOO_LONG), (1, Dropped.TOO_LONG)]


def test_busy_replica_sheds_fanout_and_serves_everyone_in_turn():
    bench = Bench(max_batch_sessions=2)
    bench.send(
        opens=[opened(number) for number in range(4)],
        commits=[commit(number, 1, 3, fanout=4) for number in range(4)],
    )
    first = bench.answers()
    assert bench.service.stats().num_pending == 2
    assert first.load.num_pending == 2
    bench.send(commits=[commit(0, 2, 4, [4])])
    second = bench.answers()
    third = bench.answers()
    order = [table.session for answer in (first, second, third) for table in answer.tables]
    assert order == [0, 1, 2, 3, 0]
    assert bench.drafter.fanouts == [2, 2, 2, 2, 2]
    assert bench.drafter.batches == [2, 2, 1]


def test_streams_do_not_share_sessions_and_die_alone():
    bench = Bench()
    other = bench.connect()
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3)])
    bench.send(opens=[opened(1, (5, 6))], commits=[commit(1, 1, 2)], target=other)
    bench.service.step()
    mine, theirs = bench.answers(), bench.answers(other)
    assert [table.base_len for table in mine.tables] == [3]
    assert [table.base_len for table in theirs.tables] == [2]
    other.close()
    bench.send(commits=[commit(1, 2, 4, [4])])
    assert len(bench.answers().tables) == 1
    stats = bench.service.stats()
    assert (stats.num_streams, stats.num_sessions) == (1, 1)
    bench.service.close()
    assert not bench.target.is_alive
    assert bench.service.stats().num_sessions == 0


def test_text_behind_a_question_does_not_leak_into_its_answer():
    bench = Bench()
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3), commit(1, 2, 5, [4, 5], fanout=0)])
    [table] = bench.answers().tables
    assert (table.round, table.base_len, table.rows[0].bonus_token_id) == (1, 3, 3)


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(draft_session, "tracer", provider.get_tracer("test"))
    return exporter.get_finished_spans


def test_a_session_is_a_span_of_its_request(spans):
    bench = Bench()
    bench.send(opens=[opened(1, traceparent=TRACEPARENT)], commits=[commit(1, 1, 3)])
    bench.answers()
    bench.send(commits=[commit(1, 2, 4, [4]), commit(1, 3, 5, [5])])
    bench.answers()
    assert spans() == ()
    bench.send(closes=[draft_pb2.Close(session=1, epoch=1)])
    bench.answers()
    (span,) = spans()
    assert span.name == "draft.session"
    assert trace.format_trace_id(span.context.trace_id) == TRACE_ID
    assert trace.format_span_id(span.parent.span_id) == PARENT_ID
    assert span.attributes == {
        "paceline.rounds": 3,
        "paceline.tables": 2,
        "paceline.rows": 2,
        "paceline.session_end": "closed",
    }


def test_a_span_ends_however_its_session_does(spans):
    bench = Bench(idle_timeout_s=10.0)
    bench.send(opens=[opened(number, traceparent=TRACEPARENT) for number in range(4)])
    bench.send(commits=[commit(0, 1, 2)])
    bench.send(opens=[opened(1, epoch=2, traceparent=TRACEPARENT)])
    bench.answers()
    bench.network.advance(6.0)
    bench.send(commits=[commit(1, 1, 3, epoch=2), commit(2, 1, 3)])
    bench.answers()
    bench.network.advance(6.0)
    bench.answers()
    bench.drafter.is_broken = True
    bench.send(commits=[commit(2, 2, 4, [4])])
    bench.answers()
    bench.service.close()
    ends = [span.attributes["paceline.session_end"] for span in spans()]
    assert ends == ["malformed", "reopened", "expired", "drafter_failed", "stream_ended"]


@pytest.mark.parametrize("traceparent", ["", "nonsense", TRACEPARENT[:-2] + "00"])
def test_sessions_without_a_sampled_request_have_no_span(spans, traceparent):
    bench = Bench()
    bench.send(opens=[opened(1, traceparent=traceparent)], commits=[commit(1, 1, 3)])
    assert len(bench.answers().tables) == 1
    bench.service.close()
    assert spans() == ()


class FarSighted(CountingDrafter):
    """Right about the bonus token and one token behind it, in texts that count."""

    def propose(self, queries):
        return [
            [OutcomeRow(-1, length, (length + 1, 0))]
            for length in (len(query.token_ids) for query in queries)
        ]


def scored(bench) -> dict[str, tuple[int, int]]:
    stats = bench.service.stats()
    return {
        role.value: (stats.num_scored_by_role[role], stats.num_confirmed_by_role[role])
        for role in DrafterRole
    }


def follow_text(bench, session: int, num_rounds: int) -> None:
    """A target whose every round commits one token: the text's length, as CountingDrafter says."""
    bench.send(opens=[opened(session)], commits=[commit(session, 1, 3)])
    bench.answers()
    for round_ in range(2, num_rounds + 1):
        length = round_ + 2
        bench.send(commits=[commit(session, round_, length, [length - 1])])
        bench.answers()
    bench.send(closes=[draft_pb2.Close(session=session, epoch=1)])
    bench.answers()


def test_tables_are_scored_by_the_text_that_follows():
    bench = Bench()
    bench.service.replace_drafter(FarSighted())
    follow_text(bench, 1, 6)
    # Six tables; the text ends before it tells all of the last three.
    assert scored(bench) == {"stable": (3, 3), "candidate": (0, 0)}


def test_a_question_that_was_overtaken_is_a_round_without_a_right_token():
    bench = Bench()
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3)])
    bench.send(commits=[commit(1, 2, 4, [3])])
    bench.answers()
    bench.send(closes=[draft_pb2.Close(session=1, epoch=1)])
    bench.answers()
    assert scored(bench)["stable"] == (1, 0)


def test_a_table_made_behind_a_round_that_asked_nothing_is_late():
    bench = Bench()
    bench.service.replace_drafter(FarSighted())
    nothing = {"num_draft_tokens": 0, "fanout": 0}
    bench.send(opens=[opened(1)], commits=[commit(1, 1, 3), commit(1, 2, 4, [3], **nothing)])
    [table] = bench.answers().tables
    assert table.base_len == 3
    bench.send(commits=[commit(1, 3, 6, [4, 5], **nothing)])
    bench.answers()
    bench.send(closes=[draft_pb2.Close(session=1, epoch=1)])
    bench.answers()
    assert scored(bench)["stable"] == (1, 0)


def test_scores_of_a_trial_are_kept_apart_and_begin_with_it():
    bench = Bench()
    bench.send(opens=[opened(7)], commits=[commit(7, 1, 3)])
    bench.answers()
    candidate = CountingDrafter()
    trial = CanaryDrafter(bench.drafter, candidate, share=0.999, vocab_size=VOCAB_SIZE)
    bench.service.replace_drafter(trial)
    follow_text(bench, 1, 6)
    assert trial.tallies[DrafterRole.CANDIDATE].num_rounds == 4
    assert trial.tallies[DrafterRole.CANDIDATE].num_confirmed == 0
    assert trial.tallies[DrafterRole.STABLE].num_rounds == 0
    # What a session was told before the trial counts for neither.
    bench.send(commits=[commit(7, 2, 6, [3, 4, 5])], closes=[draft_pb2.Close(session=7, epoch=1)])
    bench.answers()
    assert trial.tallies[DrafterRole.STABLE].num_rounds == 0
    assert scored(bench) == {"stable": (0, 0), "candidate": (4, 0)}

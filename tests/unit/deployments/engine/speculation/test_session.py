import pytest

from deployments.engine.speculation.errors import MalformedMessageError
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.types import Ask, DraftOrigin, DraftTree
from protos import draft_pb2
from tests.fakes_speculation import VOCAB_SIZE, spec_of

TEXT = list(range(1, 11))
ASK = Ask(2, 1)
CHAIN = DraftTree.chain((20, 21), DraftOrigin.POOL)


def live_session() -> PoolSession:
    session = PoolSession(spec_of(1, TEXT), VOCAB_SIZE)
    session.open(TEXT, room=100)
    return session


def announce(session: PoolSession, text: list[int], now: float = 0.0) -> draft_pb2.Commit:
    return session.commit(text, CHAIN, ASK, room=100, now=now)


def answer(commit: draft_pb2.Commit, bonus: int, **changed) -> draft_pb2.Table:
    fields = {
        "session": commit.session,
        "epoch": commit.epoch,
        "round": commit.round,
        "base_len": commit.base_len,
        "rows": [draft_pb2.Row(node=2, bonus_token_id=bonus, draft_token_ids=[1, 2])],
    }
    return draft_pb2.Table(**(fields | changed))


def test_text_goes_out_in_parts_and_only_the_last_asks():
    session = PoolSession(spec_of(1, TEXT), VOCAB_SIZE)
    assert list(session.open(TEXT, room=4).token_ids) == TEXT[:4]
    parts = [session.commit(TEXT, CHAIN, ASK, room=4, now=0.0) for _ in range(2)]
    assert [list(part.committed) for part in parts] == [TEXT[4:8], TEXT[8:]]
    assert [part.base_len for part in parts] == [8, 10]
    assert [part.fanout for part in parts] == [0, 1]
    assert [len(part.in_flight_token_ids) for part in parts] == [0, 2]


def test_every_open_is_a_new_epoch_that_old_messages_do_not_touch():
    session = live_session()
    old = announce(session, TEXT)
    session.suspend()
    assert session.open(TEXT, room=100).epoch == 2
    new = announce(session, TEXT)
    assert new.round == old.round == 1
    assert session.on_table(answer(old, 3), 1.0) is None
    assert not session.on_resync(draft_pb2.Resync(session=1, epoch=1, round=1, have_len=2))
    assert not session.on_dropped(draft_pb2.Dropped(session=1, epoch=1, reason=1))
    assert session.is_live
    assert session.on_table(answer(new, 3), 1.0) is not None


def test_tables_serve_once_and_know_their_delay():
    session = live_session()
    first = announce(session, TEXT, now=10.0)
    second = announce(session, [*TEXT, 20, 5], now=11.0)
    late = session.on_table(answer(first, 5), 11.5)
    assert (late.round_trip_s, late.is_late) == (1.5, True)
    assert session.on_table(answer(first, 5), 11.6) is None
    on_time = session.on_table(answer(second, 6), 11.7)
    assert not on_time.is_late
    assert session.draft_after([*TEXT, 20, 5, 20, 21, 6]).token_ids == (1, 2)
    assert session.draft_after([*TEXT, 20, 21, 5]).token_ids == (1, 2)


def test_a_drafter_is_silent_while_its_newest_table_is_empty():
    session = live_session()
    said = []
    for rows in ([], [draft_pb2.Row(bonus_token_id=5)], []):
        session.on_table(answer(announce(session, TEXT), 5, rows=rows), 1.0)
        said.append(session.is_silent)
    assert said == [True, False, True]
    session.moved()
    assert not session.is_silent


def test_rounds_long_ago_are_forgotten():
    session = live_session()
    commits = [announce(session, [*TEXT, *[1] * extra]) for extra in range(6)]
    assert session.on_table(answer(commits[0], 5), 1.0) is None
    assert session.on_table(answer(commits[2], 5), 1.0) is not None


@pytest.mark.parametrize("change", [{"base_len": 9}, {"rows": [draft_pb2.Row(node=3)]}])
def test_a_table_that_does_not_answer_its_round_is_malformed(change):
    session = live_session()
    with pytest.raises(MalformedMessageError):
        session.on_table(answer(announce(session, TEXT), 5, **change), 1.0)


def test_a_gap_is_repaired_once():
    session = live_session()
    announce(session, [*TEXT, 1])
    announce(session, [*TEXT, 1, 2])
    gap = draft_pb2.Resync(session=1, epoch=1, round=1, have_len=10)
    assert session.on_resync(gap)
    # The report about the second commit says nothing new: it was sent before the repair.
    assert not session.on_resync(draft_pb2.Resync(session=1, epoch=1, round=2, have_len=10))
    repaired = announce(session, [*TEXT, 1, 2, 3])
    assert (list(repaired.committed), repaired.base_len) == ([1, 2, 3], 13)
    assert session.on_resync(draft_pb2.Resync(session=1, epoch=1, round=3, have_len=10))


@pytest.mark.parametrize(("round_", "have_len"), [(1, 0), (1, 11), (2, 10)])
def test_a_resync_beyond_what_was_sent_is_malformed(round_, have_len):
    session = live_session()
    announce(session, TEXT)
    with pytest.raises(MalformedMessageError):
        session.on_resync(draft_pb2.Resync(session=1, epoch=1, round=round_, have_len=have_len))


def test_a_dropped_session_waits_longer_each_time_until_a_table_comes():
    session = live_session()

    def waits() -> int:
        dropped = draft_pb2.Dropped(session=1, epoch=session.epoch, reason=1)
        assert session.on_dropped(dropped)
        assert not session.has_asked
        num_rounds = 0
        while not session.may_open:
            session.pass_round()
            num_rounds += 1
        session.open(TEXT, room=100)
        return num_rounds

    assert [waits() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    session.on_table(answer(announce(session, TEXT), 5), 1.0)
    assert waits() == 1


def test_too_long_is_for_good_until_the_session_moves():
    session = live_session()
    reason = draft_pb2.Dropped.TOO_LONG
    session.on_dropped(draft_pb2.Dropped(session=1, epoch=1, reason=reason))
    for _ in range(100):
        session.pass_round()
    assert not session.may_open
    session.moved()
    assert session.may_open

"""Golden frames: these bytes are what a replica of another version sends. And what is refused."""

import pickle

import pytest

from deployments.engine.speculation import errors, wire
from deployments.engine.speculation.errors import HandshakeError, MalformedMessageError
from deployments.engine.speculation.handshake import PROTOCOL_VERSION, Identity, check_hello
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.types import (
    Ask,
    DraftOrigin,
    DraftSampling,
    DraftTree,
    OutcomeRow,
    SessionSpec,
)
from protos import draft_pb2

SPEC = SessionSpec(
    session_id=7,
    request_id="req-1",
    tenant="acme",
    token_ids=(1, 300, 49_151),
    sampling=DraftSampling(
        seed=2**64 - 1, choice_index=1, temperature=0.8, top_k=40, top_p=0.95, min_p=0.05
    ),
    traceparent="00-ab-cd-01",
)
TREE = DraftTree((10, 20, 11), (-1, -1, 0))
VOCAB_SIZE = 49_152


def target_frame() -> draft_pb2.TargetFrame:
    session = PoolSession(SPEC, VOCAB_SIZE)
    opened = session.open(SPEC.token_ids, room=100)
    commit = session.commit([*SPEC.token_ids, 5], TREE, Ask(4, 2), room=100, now=0.0)
    return draft_pb2.TargetFrame(
        closes=[draft_pb2.Close(session=3, epoch=2)], opens=[opened], commits=[commit]
    )


def draft_frame() -> draft_pb2.DraftFrame:
    rows = [OutcomeRow(2, 9, (8, 300)), OutcomeRow(-1, 4, ())]
    return draft_pb2.DraftFrame(
        tables=[
            draft_pb2.Table(session=7, epoch=1, round=1, base_len=4, rows=wire.rows_to_wire(rows))
        ],
        resyncs=[draft_pb2.Resync(session=8, epoch=1, round=3, have_len=12)],
        drops=[draft_pb2.Dropped(session=9, epoch=4, reason=draft_pb2.Dropped.EVICTED)],
        load=draft_pb2.Load(num_pending=1, num_sessions=2, batch_us=1500),
    )


HELLO = Identity(model="m", vocab_size=VOCAB_SIZE, vocab_digest="ab").hello("target-1")
GOLDEN = {
    "hello": (
        lambda: draft_pb2.TargetFrame(hello=HELLO),
        ("0a190801108080031a02616220012a087461726765742d3132016d"),
    ),
    "target": (
        target_frame,
        (
            "1204080310021a50080710011a057265712d31220461636d652a0601ac02ffff02322809ffffffff"
            "ffffffff1001199a9999999999e93f202829666666666666ee3f319a9999999999a93f3a0b30302d"
            "61622d63642d3031221908071001180120042a010532030a140b3a0300000140044802"
        ),
    ),
    "draft": (
        draft_frame,
        (
            "121708071001180120042a09080310091a0308ac022a0210041a08080810011803200c2206080910"
            "0418022a070801100218dc0b"
        ),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames(name):
    make, golden = GOLDEN[name]
    frame = make()
    assert frame.SerializeToString(deterministic=True).hex() == golden
    assert type(frame).FromString(bytes.fromhex(golden)) == frame


def test_session_survives_the_wire():
    opened = PoolSession(SPEC, VOCAB_SIZE).open(SPEC.token_ids, room=100)
    assert wire.open_from_wire(opened, SPEC.session_id, VOCAB_SIZE) == SPEC


def test_draft_in_flight_and_rows_survive_the_wire():
    commit = target_frame().commits[0]
    tree = wire.in_flight_from_wire(commit, VOCAB_SIZE)
    assert (tree.token_ids, tree.parents) == (TREE.token_ids, TREE.parents)
    rows = [OutcomeRow(2, 9, (8,)), OutcomeRow(-1, 4, ())]
    assert wire.rows_from_wire(wire.rows_to_wire(rows), TREE, VOCAB_SIZE) == rows


@pytest.mark.parametrize(
    "fields",
    [
        {"in_flight_token_ids": [1, 2], "in_flight_parents": [0]},
        {"in_flight_token_ids": [1], "in_flight_parents": [1]},
        {"in_flight_token_ids": [1, 2], "in_flight_parents": [2, 0]},
        {"in_flight_token_ids": [1, 1], "in_flight_parents": [0, 0]},
        {"in_flight_token_ids": [VOCAB_SIZE], "in_flight_parents": [0]},
        {"in_flight_token_ids": [1] * 513, "in_flight_parents": range(513)},
        {"num_draft_tokens": 33},
        {"fanout": 17},
    ],
)
def test_commits_that_make_no_sense(fields):
    with pytest.raises(MalformedMessageError):
        wire.in_flight_from_wire(draft_pb2.Commit(**fields), VOCAB_SIZE)


@pytest.mark.parametrize(
    "row",
    [
        draft_pb2.Row(node=4),
        draft_pb2.Row(bonus_token_id=VOCAB_SIZE),
        draft_pb2.Row(draft_token_ids=[VOCAB_SIZE]),
        draft_pb2.Row(draft_token_ids=[1] * 33),
    ],
)
def test_rows_that_make_no_sense(row):
    with pytest.raises(MalformedMessageError):
        wire.rows_from_wire([row], TREE, VOCAB_SIZE)


def test_more_rows_than_outcomes():
    with pytest.raises(MalformedMessageError):
        wire.rows_from_wire([draft_pb2.Row()] * 65, TREE, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("min_p", 1.5)],
)
def test_opens_that_make_no_sense(field, value):
    opened = PoolSession(SPEC, VOCAB_SIZE).open(SPEC.token_ids, room=100)
    setattr(opened.sampling, field, value)
    with pytest.raises(MalformedMessageError):
        wire.open_from_wire(opened, 1, VOCAB_SIZE)


def test_an_open_without_text_or_with_foreign_tokens():
    with pytest.raises(MalformedMessageError):
        wire.open_from_wire(draft_pb2.Open(), 1, VOCAB_SIZE)
    opened = PoolSession(SPEC, VOCAB_SIZE).open((VOCAB_SIZE,), room=1)
    with pytest.raises(MalformedMessageError):
        wire.open_from_wire(opened, 1, VOCAB_SIZE)


def test_hello_is_checked_field_by_field():
    identity = Identity(model="m", vocab_size=100, vocab_digest="ab")
    check_hello(identity, identity.hello("t"))
    assert PROTOCOL_VERSION == 1
    for field, value in [
        ("protocol_version", 9),
        ("vocab_size", 101),
        ("vocab_digest", "cd"),
        ("noise_version", 9),
        ("model", "other"),
    ]:
        hello = identity.hello("t")
        setattr(hello, field, value)
        with pytest.raises(HandshakeError, match=field) as raised:
            check_hello(identity, hello)
        assert repr(value) in str(raised.value)


def test_errors_survive_pickling():
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.SpeculationError)
    ]
    assert len(kinds) == 6
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind("what")))  # noqa: S301
        assert (type(again), str(again)) == (kind, "what")


def test_chain_trees():
    assert DraftTree.chain((1, 2), DraftOrigin.POOL).is_chain
    assert not TREE.is_chain

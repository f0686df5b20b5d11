"""Golden frames: these bytes are what a replica of another version sends. And what is refused."""

import pickle

import pytest

from deployments.engine.speculation import errors, wire
from deployments.engine.speculation.errors import HandshakeError, MalformedMessageError
from deployments.engine.speculation.handshake import PROTOCOL_VERSION, Identity, check_hello
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.types import DraftOrigin, DraftTree, OutcomeRow
from protos import draft_pb2
from tests import golden_frames
from tests.golden_frames import SPEC, TREE, VOCAB_SIZE

VERSIONS = sorted(path.name for path in golden_frames.FOLDER.iterdir())


def golden(version: str, name: str) -> bytes:
    return (golden_frames.FOLDER / version / f"{name}.bin").read_bytes()


def target_frame() -> draft_pb2.TargetFrame:
    return golden_frames.frames()["target"]


@pytest.mark.parametrize("name", golden_frames.frames())
def test_frames_are_those_of_this_version(name):
    """Other bytes are another version: raise ``PROTOCOL_VERSION``, see ``tests.golden_frames``."""
    frame = golden_frames.frames()[name]
    data = golden(f"v{PROTOCOL_VERSION}", name)
    assert frame.SerializeToString(deterministic=True) == data
    assert type(frame).FromString(data) == frame


def test_golden_frames_set_every_field():
    """A new field changes no byte while it is unset, so it must be set in a frame."""

    def fields_of(message):
        found = set()
        for field, value in message.ListFields():
            found.add(field.full_name)
            if field.type == field.TYPE_MESSAGE:
                items = value if field.is_repeated else [value]
                found = found.union(*map(fields_of, items))
        return found

    seen = set().union(*map(fields_of, golden_frames.frames().values()))
    messages = draft_pb2.DESCRIPTOR.message_types_by_name.values()
    assert seen == {field.full_name for message in messages for field in message.fields}


def test_versions_are_kept_and_numbered_without_gaps():
    assert {f"v{number}" for number in range(1, PROTOCOL_VERSION + 1)} == set(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_targets_of_every_version_are_understood_or_refused_by_name(version):
    hello = draft_pb2.TargetFrame.FromString(golden(version, "hello")).hello
    assert f"v{hello.protocol_version}" == version
    if hello.protocol_version == PROTOCOL_VERSION:
        check_hello(golden_frames.IDENTITY, hello)
        return
    with pytest.raises(HandshakeError, match="protocol_version"):
        check_hello(golden_frames.IDENTITY, hello)


def test_session_survives_the_wire():
    opened = PoolSession(SPEC, VOCAB_SIZE).open(SPEC.token_ids, room=100)
    assert wire.open_from_wire(opened, SPEC.session_id, VOCAB_SIZE) == SPEC


def test_draft_in_flight_and_rows_survive_the_wire():
    commit = target_frame().commits[0]
    tree = wire.in_flight_from_wire(commit, VOCAB_SIZE)
    assert (tree.token_ids, tree.parents) == (TREE.token_ids, TREE.parents)
    rows = [OutcomeRow(2, 9, (8,)), OutcomeRow(-1, 4, ())]
    assert wire.rows_from_wire(wire.rows_to_wire(rows), TREE, VOCAB_SIZE) == rows


def test_chances_survive_the_wire_nearly():
    rows = [OutcomeRow(-1, 9, (8, 7), (1.0, 0.333, 0.0)), OutcomeRow(-1, 4, (5,), (0.7,))]
    again = wire.rows_from_wire(wire.rows_to_wire(rows), TREE, VOCAB_SIZE)
    for row, same in zip(rows, again, strict=True):
        assert same.chances == pytest.approx(row.chances, abs=1 / 500)


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
        draft_pb2.Row(draft_token_ids=[1], chances=b"123"),
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
    assert PROTOCOL_VERSION == 2
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

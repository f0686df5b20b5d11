"""``python -m tests.golden_frames``: one frame of every kind, as bytes, for each protocol version.

What is committed under ``tests/data/frames/v<version>`` is what replicas of that version say, so it
is never changed. Whoever changes the bytes raises ``PROTOCOL_VERSION`` and runs this once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.engine.speculation import wire
from deployments.engine.speculation.handshake import PROTOCOL_VERSION, Identity
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.types import (
    Ask,
    DraftSampling,
    DraftTree,
    OutcomeRow,
    SessionSpec,
)
from protos import draft_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

FOLDER = Path("tests/data/frames")
VOCAB_SIZE = 49_152
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
IDENTITY = Identity(model="m", vocab_size=VOCAB_SIZE, vocab_digest="ab")


def frames() -> dict[str, Message]:
    """By the name of their file; together they set every field there is."""
    session = PoolSession(SPEC, VOCAB_SIZE)
    opened = session.open(SPEC.token_ids, room=100)
    commit = session.commit([*SPEC.token_ids, 5], TREE, Ask(4, 2, within_s=0.02), room=100, now=0.0)
    rows = [OutcomeRow(2, 9, (8, 300), (0.5, 0.25, 1.0)), OutcomeRow(-1, 4, ())]
    return {
        "hello": draft_pb2.TargetFrame(hello=IDENTITY.hello("target-1")),
        "welcome": draft_pb2.DraftFrame(
            welcome=draft_pb2.Welcome(protocol_version=PROTOCOL_VERSION, max_session_tokens=32_768)
        ),
        "target": draft_pb2.TargetFrame(
            closes=[draft_pb2.Close(session=3, epoch=2)], opens=[opened], commits=[commit]
        ),
        "draft": draft_pb2.DraftFrame(
            tables=[
                draft_pb2.Table(
                    session=7, epoch=1, round=1, base_len=4, rows=wire.rows_to_wire(rows)
                )
            ],
            resyncs=[draft_pb2.Resync(session=8, epoch=1, round=3, have_len=12)],
            drops=[draft_pb2.Dropped(session=9, epoch=4, reason=draft_pb2.Dropped.EVICTED)],
            load=draft_pb2.Load(num_pending=1, num_sessions=2, batch_us=1500),
        ),
    }


def main() -> int:
    """Write the frames of a new version."""
    folder = FOLDER / f"v{PROTOCOL_VERSION}"
    if folder.exists():
        sys.stderr.write(f"{folder} is there and is never changed; raise PROTOCOL_VERSION first\n")
        return 1
    folder.mkdir(parents=True)
    for name, frame in frames().items():
        (folder / f"{name}.bin").write_bytes(frame.SerializeToString(deterministic=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())

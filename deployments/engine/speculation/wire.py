"""Between the wire's messages and our plain types. Whatever comes in is checked here, once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deployments.engine.speculation.errors import MalformedMessageError
from deployments.engine.speculation.types import (
    DraftSampling,
    DraftTree,
    OutcomeRow,
    SessionSpec,
)
from protos import draft_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_IN_FLIGHT_NODES = 512
MAX_DRAFT_TOKENS = 32
MAX_FANOUT = 16
_MOST_CHANCE = 255
_CHANCES = tuple(chance / _MOST_CHANCE for chance in range(_MOST_CHANCE + 1))


def check_token_ids(token_ids: Iterable[int], vocab_size: int) -> None:
    """Return if every id is in the vocabulary.

    Raises:
        MalformedMessageError: one is not.
    """
    if max(token_ids, default=0) >= vocab_size:
        raise MalformedMessageError("a token id is outside the vocabulary")


def open_to_wire(spec: SessionSpec, epoch: int, token_ids: Sequence[int]) -> draft_pb2.Open:
    """The message that opens a session with the first part of its text."""
    sampling = spec.sampling
    return draft_pb2.Open(
        session=spec.session_id,
        epoch=epoch,
        request_id=spec.request_id,
        tenant=spec.tenant,
        token_ids=token_ids,
        sampling=draft_pb2.Sampling(
            seed=sampling.seed,
            choice_index=sampling.choice_index,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        ),
        traceparent=spec.traceparent or "",
    )


def open_from_wire(message: draft_pb2.Open, session_id: int, vocab_size: int) -> SessionSpec:
    """The session a target opened.

    Args:
        message: from a target.
        session_id: the id the session goes by on this side.
        vocab_size: ids must be below it.

    Raises:
        MalformedMessageError: no text, a token id or a sampling value out of range.
    """
    if not message.token_ids:
        raise MalformedMessageError("a session without text")
    check_token_ids(message.token_ids, vocab_size)
    sampling = message.sampling
    if not (
        math.isfinite(sampling.temperature)
        and sampling.temperature >= 0.0
        and 0.0 < sampling.top_p <= 1.0
        and 0.0 <= sampling.min_p <= 1.0
    ):
        raise MalformedMessageError("sampling values out of range")
    return SessionSpec(
        session_id=session_id,
        request_id=message.request_id,
        tenant=message.tenant,
        token_ids=tuple(message.token_ids),
        sampling=DraftSampling(
            seed=sampling.seed,
            choice_index=sampling.choice_index,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        ),
        traceparent=message.traceparent or None,
    )


def in_flight_from_wire(message: draft_pb2.Commit, vocab_size: int) -> DraftTree:
    """The draft a target is verifying.

    Raises:
        MalformedMessageError: parents do not come before their children, siblings repeat a token,
            an id is out of range, or there are too many nodes.
    """
    token_ids = tuple(message.in_flight_token_ids)
    parents = tuple(parent - 1 for parent in message.in_flight_parents)
    if len(token_ids) != len(parents) or len(token_ids) > MAX_IN_FLIGHT_NODES:
        raise MalformedMessageError("the in-flight draft has no proper size")
    if any(parent >= node for node, parent in enumerate(parents)):
        raise MalformedMessageError("an in-flight node comes before its parent")
    if len(set(zip(parents, token_ids, strict=True))) != len(token_ids):
        raise MalformedMessageError("two in-flight siblings carry the same token")
    check_token_ids(token_ids, vocab_size)
    if message.num_draft_tokens > MAX_DRAFT_TOKENS or message.fanout > MAX_FANOUT:
        raise MalformedMessageError("more draft tokens or fan-out asked than the protocol allows")
    return DraftTree(token_ids, parents)


def rows_to_wire(rows: Iterable[OutcomeRow]) -> list[draft_pb2.Row]:
    """Outcome rows as messages, in order."""
    return [
        draft_pb2.Row(
            node=row.node + 1,
            bonus_token_id=row.bonus_token_id,
            draft_token_ids=row.draft_token_ids,
            chances=bytes(round(_MOST_CHANCE * chance) for chance in row.chances),
        )
        for row in rows
    ]


def rows_from_wire(
    rows: Sequence[draft_pb2.Row], in_flight: DraftTree, vocab_size: int
) -> list[OutcomeRow]:
    """The rows a drafter sent for a round.

    Args:
        rows: from a drafter.
        in_flight: the draft of that round, as the target remembers it.
        vocab_size: ids must be below it.

    Raises:
        MalformedMessageError: more rows than outcomes were asked, a node that is not in the draft,
            an over-long draft, more chances than tokens, or an id out of range.
    """
    if len(rows) > (len(in_flight) + 1) * MAX_FANOUT:
        raise MalformedMessageError("more rows than outcomes")
    checked = []
    for row in rows:
        node, bonus, chances = row.node, row.bonus_token_id, row.chances
        draft = tuple(row.draft_token_ids)
        if node > len(in_flight):
            raise MalformedMessageError("a row for a node that is not in flight")
        if len(draft) > MAX_DRAFT_TOKENS:
            raise MalformedMessageError("a row's draft is too long")
        if len(chances) > 1 + len(draft):
            raise MalformedMessageError("a row with more chances than tokens")
        check_token_ids((bonus, *draft), vocab_size)
        checked.append(
            OutcomeRow(node - 1, bonus, draft, tuple(map(_CHANCES.__getitem__, chances)))
        )
    return checked

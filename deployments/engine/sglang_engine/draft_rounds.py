"""Rounds of speculation as SGLang's scheduler runs them; knows nothing of SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.engine.sglang_engine.draft_spans import RoundsSpan
from deployments.engine.speculation.acceptance import accept
from deployments.engine.speculation.speculator import (
    DraftRequest,
    RoundResult,
    StepLoad,
    TakenDraft,
)
from deployments.engine.speculation.types import (
    DraftOrigin,
    DraftSampling,
    DraftTree,
    SessionSpec,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deployments.engine.speculation.speculator import Speculator

PLAIN = DraftTree()
_NOTHING = TakenDraft(tree=PLAIN)


class Running(NamedTuple):
    """A sequence that gets tokens in the coming step.

    Attributes:
        rid: SGLang's name for it.
        own: what came with the request, see ``own_params``; None for SGLang's own ones.
        prompt_ids: without output.
        output_ids: what is committed of it.
        max_draft_tokens: no more fits.
    """

    rid: str
    own: Mapping[str, Any] | None
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    max_draft_tokens: int

    @property
    def length(self) -> int:
        """Committed tokens, prompt included."""
        return len(self.prompt_ids) + len(self.output_ids)


class RoundCounts(NamedTuple):
    """What one step did for one sequence."""

    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_accepted_pool: int = 0
    num_table_hits: int = 0
    num_table_misses: int = 0


class Committed(NamedTuple):
    """What one step gave one sequence.

    Attributes:
        token_ids: the accepted ones and the bonus token.
        nodes: accepted ones of the draft, from the root's child downwards.
    """

    token_ids: list[int]
    nodes: tuple[int, ...]
    counts: RoundCounts


class _Session:
    def __init__(self, session_id: int, token_ids: list[int], traceparent: str | None) -> None:
        self.session_id = session_id
        self.token_ids = token_ids
        self.span = RoundsSpan(traceparent)


class DraftRounds:
    """Used from the scheduler's thread alone; nothing here waits.

    Args:
        vocab_size: of the logits.
        takes_trees: whether drafts with branches are verified as they are; of others the likeliest
            chain is.
    """

    def __init__(
        self, speculator: Speculator, vocab_size: int, *, takes_trees: bool = False
    ) -> None:
        self._speculator = speculator
        self._vocab_size = vocab_size
        self._takes_trees = takes_trees
        self._sessions: dict[str, _Session] = {}
        self._num_sessions = 0
        self._step: list[tuple[Running, TakenDraft]] = []
        self._unannounced: list[tuple[DraftRequest, DraftTree]] = []

    def begin(self, batch: Sequence[Running]) -> list[DraftTree]:
        """What to verify for each sequence, possibly nothing."""
        for rid in self._sessions.keys() - {running.rid for running in batch}:
            # It ended, or gave its rows back and will come again with all its text.
            self.leave(rid)
        requests: list[DraftRequest] = []
        asking: list[int] = []
        for index, running in enumerate(batch):
            session = self._session(running)
            if session is not None:
                asking.append(index)
                requests.append(_request(running, session))
        taken = [_NOTHING] * len(batch)
        self._unannounced = []
        if requests:
            num_others = len(batch) - len(requests)
            answers = self._speculator.take(requests, StepLoad(num_others, num_others))
            for index, request, answer in zip(asking, requests, answers, strict=True):
                taken[index] = self._usable(answer, request.max_draft_tokens)
            self._unannounced = [
                (request, taken[index].tree)
                for index, request in zip(asking, requests, strict=True)
            ]
        self._step = list(zip(batch, taken, strict=True))
        return [draft.tree for draft in taken]

    def announce(self) -> None:
        """Tell the pool what ``begin`` gave; right before the forward.

        Threads that send wake up here. Beside small tensor operations they would keep the
        interpreter from this one again and again; beside the forward it is free.
        """
        if self._unannounced:
            self._speculator.verifying(self._unannounced)
            self._unannounced = []

    def end(self, choices: Sequence[Sequence[int]]) -> list[Committed]:
        """Accept what the drafts of ``begin`` foresaw, and learn from it; behind ``announce``.

        Args:
            choices: per sequence the target's token behind the committed text and behind each
                node of its draft; more than those are ignored.
        """
        committed = []
        results = []
        for (running, taken), chosen in zip(self._step, choices, strict=True):
            tokens, nodes, _ = one = commit(taken.tree, chosen)
            committed.append(one._replace(counts=_counts(taken, nodes)))
            session = self._sessions.get(running.rid)
            if session is not None:
                results.append(
                    RoundResult(
                        session_id=session.session_id,
                        tree=taken.tree,
                        nodes=nodes,
                        new_token_ids=tuple(tokens),
                    )
                )
        if results:
            self._speculator.verified(results)
        for (running, _), one in zip(self._step, committed, strict=True):
            if (session := self._sessions.get(running.rid)) is not None:
                session.token_ids += one.token_ids
                session.span.round(
                    num_draft_tokens=one.counts.num_draft_tokens,
                    num_accepted=one.counts.num_accepted,
                    num_accepted_pool=one.counts.num_accepted_pool,
                    is_hit=one.counts.num_table_hits > 0,
                )
        self._step = []
        return committed

    def leave(self, rid: str) -> None:
        """A sequence ended; unknown ones are ignored."""
        session = self._sessions.pop(rid, None)
        if session is not None:
            self._speculator.close(session.session_id)
            session.span.end()

    def _session(self, running: Running) -> _Session | None:
        own = running.own
        if own is None or not own["speculation"]:
            return None
        session = self._sessions.get(running.rid)
        if session is not None and len(session.token_ids) == running.length:
            return session
        # Tokens came that were not chosen here: SGLang cut an output, or prefilled it again.
        self.leave(running.rid)
        self._num_sessions += 1
        text = [*running.prompt_ids, *running.output_ids]
        session = _Session(self._num_sessions, text, own["traceparent"])
        self._sessions[running.rid] = session
        self._speculator.open(
            SessionSpec(
                session_id=session.session_id,
                request_id=own["request_id"],
                tenant=own["tenant"],
                token_ids=tuple(session.token_ids),
                sampling=DraftSampling(
                    seed=own["seed"],
                    choice_index=own["choice_index"],
                    temperature=own["temperature"],
                    top_k=own["top_k"],
                    top_p=own["top_p"],
                    min_p=own["min_p"],
                ),
                traceparent=own["traceparent"],
            )
        )
        return session

    def _usable(self, taken: TakenDraft, max_draft_tokens: int) -> TakenDraft:
        tree = taken.tree if self._takes_trees else likeliest_chain(taken.tree)
        tree = tree.cut(max(0, max_draft_tokens))
        if not all(0 <= token < self._vocab_size for token in tree.token_ids):
            tree = PLAIN
        return TakenDraft(tree=tree, table_hit=taken.table_hit, table_miss=taken.table_miss)


def commit(tree: DraftTree, choices: Sequence[int]) -> Committed:
    """What a draft's verification gives.

    Args:
        tree: the draft.
        choices: see ``DraftRounds.end``.
    """
    nodes, bonus_token_id = accept(tree, choices)
    tokens = [*(tree.token_ids[node] for node in nodes), bonus_token_id]
    return Committed(tokens, nodes, RoundCounts())


def likeliest_chain(tree: DraftTree) -> DraftTree:
    """The path of the likeliest nodes; a tree's nodes come by falling chance."""
    path: list[int] = []
    for node, parent in enumerate(tree.parents):
        if parent == (path[-1] if path else -1):
            path.append(node)
    origins = tree.origins or (DraftOrigin.NONE,) * len(tree)
    return DraftTree(
        tuple(tree.token_ids[node] for node in path),
        tuple(range(-1, len(path) - 1)),
        tuple(origins[node] for node in path),
    )


def _request(running: Running, session: _Session) -> DraftRequest:
    own = running.own
    return DraftRequest(
        session_id=session.session_id,
        token_ids=session.token_ids,
        max_draft_tokens=running.max_draft_tokens,
        tpot_target_s=None if own is None else own["tpot_target_s"],
    )


def _counts(taken: TakenDraft, nodes: tuple[int, ...]) -> RoundCounts:
    origins = [taken.tree.origins[node] for node in nodes]
    return RoundCounts(
        num_draft_tokens=len(taken.tree),
        num_accepted=len(nodes),
        num_accepted_pool=origins.count(DraftOrigin.POOL),
        num_table_hits=int(taken.table_hit),
        num_table_misses=int(taken.table_miss),
    )

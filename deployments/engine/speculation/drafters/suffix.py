"""Drafts from what followed the same words before, in the text or in the tenant's earlier output.

Source: the idea of prompt lookup and suffix decoding (arXiv:2411.04975), with counts of what
followed short contexts in place of a suffix tree.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.follower_counts import (
    FollowerCounts,
    Followers,
    warm_up,
)
from deployments.engine.speculation.drafters.follower_kernels import MAX_CONTEXT_TOKENS
from deployments.engine.speculation.types import OutcomeRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftQuery, SessionSpec

_OWN_WEIGHT = 4.0
"""How many times a session's own text counts as much as the tenant's earlier outputs."""
_LEAST_CHANCE = 0.02
"""That a token is right with all before it; what would stand behind a less likely one is not
looked for."""
_MOST_AT_ONCE = 512
"""Tokens that are learned at once of a text, so that a long one holds no step up."""
_MOST_WAITING = 262_144
"""Tokens of ended outputs that are not learned yet; beyond it the oldest are left out."""


class _Session:
    __slots__ = ("counts", "num_heard", "output", "pending", "tenant")

    def __init__(self, tenant: str, max_tokens: int, prompt: Sequence[int]) -> None:
        self.tenant = tenant
        self.counts = FollowerCounts(max_tokens)
        self.pending = list(prompt[-max_tokens:])
        self.num_heard = len(prompt)
        self.output: list[int] = []


class _Output(NamedTuple):
    """What ended sessions left to learn for their tenant."""

    tenant: str
    token_ids: list[int]


class SuffixDrafter(Drafter):
    """The tokens that followed the text's last few most often, each with its chance.

    It counts in the session's own text and in its tenant's earlier outputs. Outputs are learned
    by the calls after a session has closed and never serve another tenant. Sessions are bounded
    by whoever opens them.

    Args:
        max_session_tokens: text remembered per session (about 0.3 KB of memory per token).
        max_tenant_tokens: output remembered per tenant.
        max_output_tokens: and of all tenants; the one unused for longest is forgotten first.
    """

    def __init__(
        self,
        *,
        max_session_tokens: int = 32_768,
        max_tenant_tokens: int = 65_536,
        max_output_tokens: int = 1_048_576,
    ) -> None:
        self._max_session_tokens = max_session_tokens
        self._max_tenant_tokens = max_tenant_tokens
        self._max_output_tokens = max_output_tokens
        self._sessions: dict[int, _Session] = {}
        self._tenants: OrderedDict[str, FollowerCounts] = OrderedDict()
        self._num_output_tokens = 0
        self._ended: deque[_Output] = deque()
        warm_up()

    def open(self, session: SessionSpec) -> None:
        """Take the prompt down; the next queries learn it, part by part."""
        self._sessions[session.session_id] = _Session(
            session.tenant, self._max_session_tokens, session.token_ids
        )

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """Learn committed output."""
        if (state := self._sessions.get(session_id)) is not None:
            self._hear(state, token_ids)

    def close(self, session_id: int) -> None:
        """Keep the output for the tenant's later sessions."""
        state = self._sessions.pop(session_id, None)
        if state is None or not state.output:
            return
        self._ended.append(_Output(state.tenant, state.output))
        while sum(len(output.token_ids) for output in self._ended) > _MOST_WAITING:
            self._ended.popleft()

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """Rows for every node of the draft in flight, deep nodes first.

        A draft worth verifying is likelier accepted to its end than cut.
        """
        self._learn_ended()
        return [self._rows(query) for query in queries]

    def _learn_ended(self) -> None:
        """The next part of the ended outputs, the oldest first."""
        left = _MOST_AT_ONCE
        while left and self._ended:
            tenant, token_ids = self._ended[0]
            counts = self._tenants.setdefault(tenant, FollowerCounts(self._max_tenant_tokens))
            self._tenants.move_to_end(tenant)
            self._num_output_tokens -= len(counts)
            counts.extend(token_ids[:left])
            self._num_output_tokens += len(counts)
            num_learned = min(left, len(token_ids))
            del token_ids[:num_learned]
            left -= num_learned
            if not token_ids:
                counts.begin()
                self._ended.popleft()
        while self._num_output_tokens > self._max_output_tokens and len(self._tenants) > 1:
            _, forgotten = self._tenants.popitem(last=False)
            self._num_output_tokens -= len(forgotten)

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        state = self._sessions.get(query.session_id)
        if state is None:
            return []
        self._hear(state, query.token_ids[state.num_heard :])
        state.counts.extend(state.pending[:_MOST_AT_ONCE])
        del state.pending[:_MOST_AT_ONCE]
        followers = Followers(state.counts, _OWN_WEIGHT, self._tenants.get(state.tenant))
        tree = query.in_flight
        committed = tuple(query.token_ids[-MAX_CONTEXT_TOKENS:])
        rows: list[OutcomeRow] = []
        for node in range(len(tree) - 1, -2, -1):
            # What the draft itself proposes behind a node is no bonus token there.
            taken = {
                token
                for token, parent in zip(tree.token_ids, tree.parents, strict=True)
                if parent == node
            }
            chains = followers.chains_behind(
                (*committed, *(tree.token_ids[at] for at in tree.path_to(node))),
                most=query.fanout,
                length=1 + query.num_draft_tokens,
                taken=taken,
                least_chance=_LEAST_CHANCE,
            )
            rows += (
                OutcomeRow(node, chain.token_ids[0], chain.token_ids[1:], chain.chances)
                for chain in chains
            )
        return rows

    def _hear(self, state: _Session, token_ids: Sequence[int]) -> None:
        state.num_heard += len(token_ids)
        state.pending += token_ids
        del state.pending[: -self._max_session_tokens]
        state.output += token_ids
        del state.output[: -self._max_tenant_tokens]

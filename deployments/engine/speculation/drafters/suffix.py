"""Drafts copied from where the text, or the tenant's earlier output, said the same before.

Source: the idea of prompt lookup and suffix decoding (arXiv:2411.04975), with a bounded n-gram
index in place of a suffix tree.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.ngram_index import MAX_MATCH_TOKENS, NgramIndex
from deployments.engine.speculation.types import OutcomeRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftQuery, SessionSpec


class _Session:
    __slots__ = ("index", "num_tokens", "output", "tenant")

    def __init__(self, tenant: str, index: NgramIndex) -> None:
        self.tenant = tenant
        self.index = index
        self.num_tokens = 0
        self.output: list[int] = []


class SuffixDrafter(Drafter):
    """Longest suffix first; among equals the most frequent continuation, then the most recent.

    It searches the session's own text and its tenant's earlier outputs, in this order among equals.
    Outputs are learned when a session closes and never serve another tenant.

    Args:
        min_match_tokens: a shorter shared suffix proposes nothing.
        max_session_tokens: text indexed per session (about 0.3 KB of memory per token).
        max_tenant_tokens: output remembered per tenant.
        max_tenants: tenants remembered; the one unused for longest is forgotten first.
        max_sessions: sessions indexed; beyond it the one unused for longest starts anew.
    """

    def __init__(
        self,
        *,
        min_match_tokens: int = 2,
        max_session_tokens: int = 32_768,
        max_tenant_tokens: int = 32_768,
        max_tenants: int = 32,
        max_sessions: int = 1_024,
    ) -> None:
        self._min_match_tokens = min_match_tokens
        self._max_session_tokens = max_session_tokens
        self._max_tenant_tokens = max_tenant_tokens
        self._max_tenants = max_tenants
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[int, _Session] = OrderedDict()
        self._tenants: OrderedDict[str, NgramIndex] = OrderedDict()

    def open(self, session: SessionSpec) -> None:
        """Index the prompt."""
        state = _Session(session.tenant, self._new_index(self._max_session_tokens))
        state.index.extend(session.token_ids)
        state.num_tokens = len(session.token_ids)
        self._sessions[session.session_id] = state
        if len(self._sessions) > self._max_sessions:
            self.close(next(iter(self._sessions)))

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """Index committed output."""
        if (state := self._sessions.get(session_id)) is not None:
            self._learn(state, token_ids)

    def close(self, session_id: int) -> None:
        """Keep the output for the tenant's later sessions."""
        state = self._sessions.pop(session_id, None)
        if state is None or not state.output:
            return
        index = self._tenants.get(state.tenant)
        if index is None:
            index = self._tenants[state.tenant] = self._new_index(self._max_tenant_tokens)
            if len(self._tenants) > self._max_tenants:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(state.tenant)
        index.extend(state.output)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """Rows for every node of the draft in flight that ends in a known suffix."""
        return [self._rows(query) for query in queries]

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        state = self._sessions.get(query.session_id)
        if state is None:
            return []
        self._sessions.move_to_end(query.session_id)
        self._learn(state, query.token_ids[state.num_tokens :])
        tree = query.in_flight
        committed = tuple(query.token_ids[-MAX_MATCH_TOKENS:])
        rows: list[OutcomeRow] = []
        # Deep nodes first: a draft worth verifying is likelier accepted to its end than cut.
        for node in range(len(tree) - 1, -2, -1):
            suffix = (*committed, *(tree.token_ids[at] for at in tree.path_to(node)))
            # What the draft itself proposes behind a node is no bonus token there.
            taken = {
                token
                for token, parent in zip(tree.token_ids, tree.parents, strict=True)
                if parent == node
            }
            rows.extend(
                OutcomeRow(node, tokens[0], tokens[1:], num_matched)
                for num_matched, tokens in self._continuations(
                    state, suffix, query.num_draft_tokens + 1
                )
                if tokens[0] not in taken
            )
        return self._at_most(rows, query.fanout)

    def _continuations(
        self, state: _Session, suffix: Sequence[int], num_tokens: int
    ) -> list[tuple[int, tuple[int, ...]]]:
        texts = [
            (match.num_matched, index.continuation(match.position, num_tokens))
            for index in (state.index, self._tenants.get(state.tenant))
            if index is not None
            for match in index.matches(suffix)
        ]
        votes: dict[int, int] = {}
        for _, text in texts:
            votes[text[0]] = votes.get(text[0], 0) + 1
        # The sort is stable: the session's own text stays before the tenant's, new before old.
        texts.sort(key=lambda item: (item[0], votes[item[1][0]]), reverse=True)
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for num_matched, text in texts:
            found.setdefault(text[0], (num_matched, text))
        return list(found.values())

    def _at_most(self, rows: list[OutcomeRow], fanout: int) -> list[OutcomeRow]:
        granted: dict[int, int] = {}
        kept = []
        for row in rows:
            granted[row.node] = granted.get(row.node, 0) + 1
            if granted[row.node] <= fanout:
                kept.append(row)
        return kept

    def _learn(self, state: _Session, token_ids: Sequence[int]) -> None:
        state.index.extend(token_ids)
        state.num_tokens += len(token_ids)
        state.output.extend(token_ids)
        del state.output[: -self._max_tenant_tokens]

    def _new_index(self, max_tokens: int) -> NgramIndex:
        return NgramIndex(min_match_tokens=self._min_match_tokens, max_tokens=max_tokens)

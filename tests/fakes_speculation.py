"""A toy language model, drafters made from it, and a target loop around a Speculator."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import torch

from deployments.engine.speculation.acceptance import accept
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.speculation.speculator import DraftRequest, RoundResult
from deployments.engine.speculation.types import (
    DraftQuery,
    DraftSampling,
    DraftTree,
    OutcomeRow,
    SessionSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.speculation.speculator import Speculator

VOCAB_SIZE = 24
IDENTITY = Identity(model="toy", vocab_size=VOCAB_SIZE, vocab_digest="d1gest")


class ToyModel:
    """Next-token scores from the last two tokens; ``noise_scale`` makes a worse copy of it."""

    def __init__(self, seed: int, noise_scale: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores = 3.0 * torch.randn(
            VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, generator=generator, dtype=torch.float64
        )
        wobble = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
        self._logp = torch.log_softmax(scores + noise_scale * wobble, dim=-1)
        self._token_ids = torch.arange(VOCAB_SIZE)

    def ranked(self, token_ids: Sequence[int], sampling: DraftSampling) -> list[int]:
        scores = self._logp[token_ids[-2], token_ids[-1]]
        if sampling.temperature > 0:
            key = row_key(sampling.seed, sampling.choice_index, len(token_ids))
            scores = scores / sampling.temperature + gumbel([key], self._token_ids)[0]
        return torch.argsort(scores, descending=True).tolist()

    def next_token(self, token_ids: Sequence[int], sampling: DraftSampling) -> int:
        return self.ranked(token_ids, sampling)[0]

    def generate(
        self, prompt: Sequence[int], sampling: DraftSampling, num_tokens: int
    ) -> list[int]:
        text = list(prompt)
        for _ in range(num_tokens):
            text.append(self.next_token(text, sampling))
        return text[len(prompt) :]


class ModelDrafter(Drafter):
    """Drafts with a toy model, coupled to the target's noise."""

    def __init__(self, model: ToyModel) -> None:
        self._model = model

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        return [self._rows(query) for query in queries]

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        rows = []
        tree = query.in_flight
        for node in range(len(tree) - 1, -2, -1):
            text = [*query.token_ids, *(tree.token_ids[at] for at in tree.path_to(node))]
            for bonus in self._model.ranked(text, query.sampling)[: query.fanout]:
                drafted = self._model.generate(
                    [*text, bonus], query.sampling, query.num_draft_tokens
                )
                rows.append(OutcomeRow(node, bonus, tuple(drafted)))
        return rows


class OracleDrafter(Drafter):
    """Knows the texts; checks that what it is told of them is a prefix of the truth."""

    def __init__(self, truth: dict[str, list[int]]) -> None:
        self._truth = truth
        self._texts: dict[int, list[int]] = {}
        self.num_open_most = 0

    def open(self, session: SessionSpec) -> None:
        text = self._truth[session.request_id]
        assert list(session.token_ids) == text[: len(session.token_ids)]
        self._texts[session.session_id] = text
        self.num_open_most = max(self.num_open_most, len(self._texts))

    def close(self, session_id: int) -> None:
        self._texts.pop(session_id, None)

    @property
    def num_open(self) -> int:
        return len(self._texts)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        return [self._rows(query) for query in queries]

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        text = self._texts[query.session_id]
        base_len = len(query.token_ids)
        assert list(query.token_ids) == text[:base_len]
        rows = []
        for node in range(-1, len(query.in_flight)):
            path = [query.in_flight.token_ids[at] for at in query.in_flight.path_to(node)]
            end = base_len + len(path)
            if path == text[base_len:end]:
                draft = text[end + 1 : end + 1 + query.num_draft_tokens]
                rows.append(OutcomeRow(node, text[end], tuple(draft)))
        return rows[::-1]


class ToyTarget:
    """Steps all its sessions together, as an engine does; every text is the model's own."""

    def __init__(
        self,
        speculator: Speculator,
        model: ToyModel,
        *,
        forward: Callable[[], None] = lambda: None,
    ) -> None:
        self._speculator = speculator
        self._model = model
        self._forward = forward
        self._num_sessions = 0

    def run(
        self,
        prompts: dict[str, tuple[int, ...]],
        sampling: DraftSampling,
        num_tokens: int,
        max_draft_tokens: int = 6,
    ) -> dict[str, list[int]]:
        texts: dict[int, list[int]] = {}
        names: dict[int, str] = {}
        for request_id, prompt in prompts.items():
            self._num_sessions += 1
            texts[self._num_sessions] = list(prompt)
            names[self._num_sessions] = request_id
            self._speculator.open(
                SessionSpec(
                    session_id=self._num_sessions,
                    request_id=request_id,
                    tenant="t",
                    token_ids=prompt,
                    sampling=sampling,
                )
            )
        goals = {session_id: len(prompts[names[session_id]]) + num_tokens for session_id in texts}
        running = set(texts)
        while running:
            requests = [
                DraftRequest(
                    session_id=session_id,
                    token_ids=texts[session_id],
                    max_draft_tokens=min(
                        max_draft_tokens, goals[session_id] - len(texts[session_id]) - 1
                    ),
                )
                for session_id in sorted(running)
            ]
            taken = self._speculator.take(requests)
            assert all(
                len(draft.tree) <= request.max_draft_tokens
                for draft, request in zip(taken, requests, strict=True)
            )
            trees = [draft.tree for draft in taken]
            self._speculator.verifying(list(zip(requests, trees, strict=True)))
            self._forward()
            results = [
                self._verify(request, tree, sampling)
                for request, tree in zip(requests, trees, strict=True)
            ]
            self._speculator.verified(results)
            for result in results:
                texts[result.session_id].extend(result.new_token_ids)
                if len(texts[result.session_id]) >= goals[result.session_id]:
                    running.remove(result.session_id)
                    self._speculator.close(result.session_id)
        return {
            names[session_id]: text[len(prompts[names[session_id]]) :]
            for session_id, text in texts.items()
        }

    def _verify(
        self, request: DraftRequest, tree: DraftTree, sampling: DraftSampling
    ) -> RoundResult:
        choices = []
        for node in range(-1, len(tree)):
            path = [tree.token_ids[at] for at in tree.path_to(node)]
            choices.append(self._model.next_token([*request.token_ids, *path], sampling))
        outcome = accept(tree, choices)
        accepted = tuple(tree.token_ids[node] for node in outcome.nodes)
        return RoundResult(
            session_id=request.session_id,
            tree=tree,
            nodes=outcome.nodes,
            new_token_ids=(*accepted, outcome.bonus_token_id),
        )


def spec_of(
    session_id: int,
    token_ids: Sequence[int],
    *,
    request_id: str | None = None,
    tenant: str = "t",
    sampling: DraftSampling | None = None,
) -> SessionSpec:
    return SessionSpec(
        session_id=session_id,
        request_id=request_id or f"r{session_id}",
        tenant=tenant,
        token_ids=tuple(token_ids),
        sampling=sampling or DraftSampling(seed=session_id),
    )


def query_of(
    session_id: int,
    token_ids: Sequence[int],
    *,
    in_flight: DraftTree | None = None,
    k: int = 4,
    fanout: int = 2,
) -> DraftQuery:
    return DraftQuery(
        session_id=session_id,
        token_ids=token_ids,
        in_flight=in_flight or DraftTree(),
        num_draft_tokens=k,
        fanout=fanout,
        sampling=DraftSampling(seed=session_id),
    )


def random_text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)  # noqa: S311
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Poll; the deadline only ends a test that would otherwise hang."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.002)

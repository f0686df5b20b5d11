"""A target with clients, on a clock that jumps from event to event.

The target's speculator and budget, the frames, their encoding, and the draft replica's service are
the real ones; how long a step takes is told by the pair. Frames take half a round trip.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from deployments.engine.config import SpeculationConfig
from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.fake_transport import FakeNetwork, Faults
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.pool_client import PoolClient
from deployments.engine.speculation.speculator import DraftRequest, NoSpeculation, RoundResult
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.types import Ask, DraftSampling, SessionSpec
from tests.bench.capacity.drafter import VOCAB_SIZE, DiceDrafter, Text

if TYPE_CHECKING:
    from deployments.engine.speculation.types import DraftTree
    from tests.bench.capacity.pairs import Pair

_ENDPOINT = "pool:1"
_IDENTITY = Identity(model="m", vocab_size=VOCAB_SIZE, vocab_digest="d")
_PROMPT_LEN = 4
_FANOUT = 3
_POLLS_PER_STEP = 16


class Place(StrEnum):
    """Where drafts come from."""

    PLAIN = "plain"
    COLOCATED = "colocated"
    OFFLOADED = "offloaded"


class World:
    """Clients that each ask for one text after the other.

    Args:
        num_free_rows: of a forward that cost no more than reading the weights; beyond them time
            grows with the rows. The same for target and drafter, as it is the GPU's.
        round_trip_s: between target and pool.
        target_s: seconds per token that every request asks for.
    """

    def __init__(
        self,
        pair: Pair,
        place: Place,
        num_draft_tokens: int,
        *,
        num_clients: int,
        num_tokens: int,
        num_free_rows: int,
        round_trip_s: float,
        target_s: float,
        seed: int,
    ) -> None:
        self._pair = pair
        self._place = place
        self._num_unmeasured = num_clients
        self._num_tokens = num_tokens
        self._num_free_rows = num_free_rows
        self._target_s = target_s
        self._seed = seed
        self._calm = Faults(min_delay_s=round_trip_s / 2, max_delay_s=round_trip_s / 2)
        self._network = FakeNetwork(seed, self._calm)
        self._texts: dict[str, Text] = {}
        self._committed: dict[int, list[int]] = {}
        self._began_at: dict[int, float] = {}
        self._num_opened = 0
        self._service: DraftService | None = None
        self._is_drafting_until = 0.0
        self._pool: PoolClient | None = None
        self._speculator = self._make_speculator(num_draft_tokens)
        self._tpots_s: list[float] = []
        # Clients are not in step: their first texts are of all lengths.
        for client in range(num_clients):
            self._open(1 + num_tokens * (client + 1) // num_clients)

    def run(self, num_texts: int, num_first_steps: int) -> list[float]:
        """Seconds per token of so many texts, begun behind the steps from which budgets learn."""
        for _ in range(num_first_steps):
            self._step()
        self._num_unmeasured = self._num_opened
        self._tpots_s.clear()
        while len(self._tpots_s) < num_texts:
            self._step()
        return self._tpots_s

    def _make_speculator(self, num_draft_tokens: int) -> SplitSpeculator | NoSpeculation:
        if self._place is Place.PLAIN:
            return NoSpeculation()
        config = SpeculationConfig(
            num_draft_tokens=num_draft_tokens, fanout=_FANOUT, local_drafter="none"
        )
        clock, acceptance = self._network.clock, self._pair.acceptance
        if self._place is Place.COLOCATED:
            beside = DiceDrafter(self._texts, acceptance, self._draft_beside)
            return SplitSpeculator(config, vocab_size=VOCAB_SIZE, local_drafter=beside, clock=clock)
        speculator = SplitSpeculator(config, vocab_size=VOCAB_SIZE, clock=clock)
        drafter = DiceDrafter(self._texts, acceptance, self._draft_apart)
        limits = DraftLimits(max_sessions=4_096, max_batch_sessions=4_096)
        self._service = DraftService(drafter, vocab_size=VOCAB_SIZE, limits=limits, clock=clock)
        self._network.listen(_ENDPOINT, _IDENTITY, self._service.accept, 32_768)
        # Without a thread that dials: it would not be on this clock.
        self._pool = speculator._pool = PoolClient(
            self._network.connector(_IDENTITY),
            vocab_size=VOCAB_SIZE,
            prompt_ask=Ask(num_draft_tokens, _FANOUT),
            clock=clock,
        )
        return speculator

    def _forward_s(self, weights_s: float, num_rows: int) -> float:
        return weights_s * max(1.0, num_rows / self._num_free_rows)

    def _draft_beside(self, num_forwards: int, num_rows: int) -> None:
        """The target waits. Its context is cached: the chain's forwards are all there are."""
        self._network.advance(num_forwards * self._forward_s(self._pair.colocated_s, num_rows))

    def _draft_apart(self, num_forwards: int, num_rows: int) -> None:
        """The answer leaves when the drafter is done, which takes no other questions meanwhile."""
        seconds = num_forwards * self._forward_s(self._pair.draft_s, num_rows)
        self._is_drafting_until = self._network.clock() + seconds
        delay_s = self._calm.min_delay_s + seconds
        self._network.faults = Faults(min_delay_s=delay_s, max_delay_s=delay_s)

    def _open(self, num_tokens: int) -> None:
        self._num_opened += 1
        key = self._num_opened
        # The same text for the nth request in every mode.
        text = Text(self._seed * 100_003 + key, _PROMPT_LEN + num_tokens)
        self._texts[f"r{key}"] = text
        self._committed[key] = text.token_ids[:_PROMPT_LEN]
        self._began_at[key] = self._network.clock()
        spec = SessionSpec(
            session_id=key,
            request_id=f"r{key}",
            tenant="t",
            token_ids=tuple(self._committed[key]),
            sampling=DraftSampling(seed=key),
        )
        self._speculator.open(spec)
        if self._pool is not None:
            self._pool.attach(f"r{key}", _ENDPOINT)

    def _step(self) -> None:
        if self._pool is not None:
            self._pool.upkeep()
        requests = [
            DraftRequest(
                session_id=key,
                token_ids=text,
                max_draft_tokens=len(self._texts[f"r{key}"].token_ids) - len(text) - 1,
                tpot_target_s=self._target_s,
            )
            for key, text in self._committed.items()
        ]
        trees = [taken.tree for taken in self._speculator.take(requests)]
        self._speculator.verifying(list(zip(requests, trees, strict=True)))
        num_rows = len(requests) + sum(map(len, trees))
        self._wait(self._forward_s(self._pair.target_s, num_rows))
        results = [
            self._verify(request, tree) for request, tree in zip(requests, trees, strict=True)
        ]
        self._speculator.verified(results)
        for result in results:
            self._commit(result)

    def _wait(self, seconds: float) -> None:
        """The target computes; the drafter takes questions whenever it is free."""
        if self._service is None:
            self._network.advance(seconds)
            return
        for _ in range(_POLLS_PER_STEP):
            self._network.advance(seconds / _POLLS_PER_STEP)
            if self._network.clock() >= self._is_drafting_until:
                self._service.step()
                self._network.faults = self._calm

    def _verify(self, request: DraftRequest, tree: DraftTree) -> RoundResult:
        text, at = self._texts[f"r{request.session_id}"].token_ids, len(request.token_ids)
        nodes = tree.walk(text[at : at + len(tree)])
        return RoundResult(
            session_id=request.session_id,
            tree=tree,
            nodes=nodes,
            new_token_ids=tuple(text[at : at + len(nodes) + 1]),
        )

    def _commit(self, result: RoundResult) -> None:
        key = result.session_id
        text = self._texts[f"r{key}"]
        self._committed[key] += result.new_token_ids
        if len(self._committed[key]) < len(text.token_ids):
            return
        num_tokens = len(text.token_ids) - _PROMPT_LEN
        if key > self._num_unmeasured:
            self._tpots_s.append((self._network.clock() - self._began_at[key]) / num_tokens)
        self._speculator.close(key)
        del self._committed[key], self._began_at[key]
        self._open(self._num_tokens)

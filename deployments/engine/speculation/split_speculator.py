"""The target's speculator: the likeliest of what pool, copies and head guess, or nothing."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.speculation.draft_source import Guess, Priors, places, seconded
from deployments.engine.speculation.drafters.guarded import GuardedDrafter
from deployments.engine.speculation.drafters.load import load_drafter
from deployments.engine.speculation.gain import GainMeter
from deployments.engine.speculation.head_budget import HeadBudget
from deployments.engine.speculation.outcome_table import NOTHING
from deployments.engine.speculation.pool_client import PoolClient, PoolDraft
from deployments.engine.speculation.running_sequence import RunningSequence
from deployments.engine.speculation.speculator import NOTHING_ELSE, Speculator, TakenDraft
from deployments.engine.speculation.speculator_stats import SpeculatorStats
from deployments.engine.speculation.step_planner import AtHand, StepPlanner
from deployments.engine.speculation.types import NO_ASK, Ask, DraftOrigin, DraftQuery, DraftTree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.config import SpeculationConfig
    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.pool_link import LinkLimits
    from deployments.engine.speculation.speculator import DraftRequest, RoundResult, StepLoad
    from deployments.engine.speculation.transport import Connector
    from deployments.engine.speculation.types import SessionSpec

logger = logging.getLogger(__name__)

_UPKEEP_INTERVAL_S = 0.05
_DIAL_INTERVAL_S = 0.005
_LOCAL_GUESSES = 3
"""First tokens that the local drafter is asked for; a tree has room for more than one."""
_EMPTY = DraftTree()


class SplitSpeculator(Speculator):
    """Speculation across the network that no step ever waits for.

    ``attach`` and ``detach`` may be called from an event loop; the rest is the engine thread's. A
    thread of its own dials and redials draft replicas; it starts with the first ``attach``.

    Args:
        vocab_size: ids outside it are never proposed.
        connect: starts a transport to an endpoint, ``grpc_transport.grpc_connector`` in production;
            None where there is no draft pool.
        on_link_lost: called with the endpoint, from that thread, when a stream is lost or refused,
            so that the owner may choose other replicas. Until then its sessions draft locally, and
            the link is redialled as long as sessions are attached to it.
        local_drafter: instead of the one that ``config.local_drafter`` names.
        takes_trees: whether the engine verifies drafts with branches.
        clock: seconds; measures the target's steps.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        *,
        vocab_size: int,
        connect: Connector | None = None,
        on_link_lost: Callable[[str], None] | None = None,
        local_drafter: Drafter | None = None,
        limits: LinkLimits | None = None,
        takes_trees: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._clock = clock
        self._takes_trees = takes_trees
        self._vocab_size = vocab_size
        self._on_link_lost = on_link_lost
        if local_drafter is None and config.local_drafter != "none":
            local_drafter = load_drafter(config.local_drafter)
        self._local = GuardedDrafter(local_drafter, vocab_size)
        self._head = GuardedDrafter(None, vocab_size)
        self._head_budget = HeadBudget()
        self._running: dict[int, RunningSequence] = {}
        self._priors: Priors = {}
        self._planner = StepPlanner()
        self._gain = GainMeter()
        self._step_began_at = 0.0
        self._num_step_rows = 0
        self._pool: PoolClient | None = None
        if connect is not None:
            prompt_ask = Ask(config.num_draft_tokens, config.fanout)
            self._pool = PoolClient(
                connect, vocab_size=vocab_size, prompt_ask=prompt_ask, limits=limits
            )
        self._thread_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._is_shut_down = False
        self._num_rounds = 0
        self._num_table_hits = 0
        self._num_table_misses = 0
        self._num_withheld = 0
        self._num_yielded = 0
        self._num_targets_met = 0
        self._num_targets_missed = 0
        self._num_drafted = dict.fromkeys(DraftOrigin, 0)
        self._num_accepted = dict.fromkeys(DraftOrigin, 0)

    def attach(self, request_id: str, endpoint: str) -> None:
        """Have a request served by the draft replica at ``endpoint`` ("host:port").

        Attaching again moves it. Without a draft pool nothing happens.
        """
        if self._pool is None:
            return
        self._pool.attach(request_id, endpoint)
        self._start_thread()
        self._wake.set()

    def detach(self, request_id: str) -> None:
        """The draft replica chosen for the request is given back; unknown ids are ignored."""
        if self._pool is not None:
            self._pool.detach(request_id)
            self._wake.set()

    def add_head(self, head: Drafter) -> None:
        """See ``Speculator.add_head``."""
        self._head = GuardedDrafter(head, self._vocab_size)

    def open(self, session: SessionSpec) -> None:
        """Prepare to draft for a sequence."""
        self._running[session.session_id] = RunningSequence(
            session, self._priors, takes_trees=self._takes_trees
        )
        self._local.open(session)
        self._head.open(session)
        if self._pool is not None:
            self._pool.open(session)
            self._wake.set()

    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        """The likeliest tokens at hand, as far as verifying them pays; else nothing.

        What a step takes is learned from those between ``take`` and ``verified``.
        """
        self._step_began_at = self._clock()
        self._num_step_rows = load.num_rows + len(requests)
        num_plain_rows, num_tokens = self._num_step_rows, load.num_tokens + len(requests)
        self._gain.begin(num_plain_rows, num_tokens)
        taken = self._at_hand(requests)
        if self._head.drafter is not None and not self._planner.is_plain_tried(num_plain_rows):
            taken = self._with_head(requests, taken, num_tokens)
        choice = self._planner.plan(
            self._drafts(requests), num_plain_rows, num_tokens, _targets_s(requests, load)
        )
        self._num_yielded += choice.num_yielded
        self._num_targets_met += choice.num_met
        self._num_targets_missed += choice.num_missed
        return [
            self._cut(request, draft, length)
            for request, draft, length in zip(requests, taken, choice.lengths, strict=True)
        ]

    def _at_hand(self, requests: Sequence[DraftRequest]) -> list[TakenDraft]:
        """All that could be verified."""
        if self._pool is None:
            from_pool = [PoolDraft(NOTHING, was_asked=False)] * len(requests)
        else:
            from_pool = self._pool.drafts(requests)
        taken: list[TakenDraft] = []
        local = self._local_drafts(requests)
        for request, draft, guesses in zip(requests, from_pool, local, strict=True):
            has_room = request.max_draft_tokens > 0
            hit = bool(draft.ahead.token_ids) and has_room
            running = self._running.get(request.session_id)
            tree = _EMPTY
            if running is not None:
                running.is_pool_silent = draft.is_silent
                from_table = (Guess.of(DraftOrigin.POOL, *draft.ahead),) if hit else ()
                running.guesses = seconded((*from_table, *guesses))
                running.merged = running.trust.merge(running.guesses, self._most(request))
                tree = running.merged.tree
            missed = draft.was_asked and has_room and not hit
            taken.append(TakenDraft(tree=tree, table_hit=hit, table_miss=missed))
            self._num_table_hits += hit
            self._num_table_misses += missed
        return taken

    def _most(self, request: DraftRequest) -> int:
        return min(request.max_draft_tokens, self._config.num_draft_tokens)

    def _drafts(self, requests: Sequence[DraftRequest]) -> list[AtHand]:
        all_running = [self._running.get(request.session_id) for request in requests]
        return [
            AtHand(running.merged.chances, running.is_due()) if running is not None else AtHand(())
            for running in all_running
        ]

    def _cut(self, request: DraftRequest, draft: TakenDraft, length: int) -> TakenDraft:
        tree = draft.tree if length == len(draft.tree) else draft.tree.cut(length)
        running = self._running.get(request.session_id)
        if running is not None:
            running.on_round(tree, had_draft=len(draft.tree) > 0, had_pool_row=draft.table_hit)
        self._num_withheld += len(draft.tree) - length
        return draft if tree is draft.tree else replace(draft, tree=tree)

    def verifying(self, rounds: Sequence[tuple[DraftRequest, DraftTree]]) -> None:
        """Announce the round to the pool, plain ones too: their bonus token can be foreseen."""
        self._num_step_rows += sum(len(tree) for _, tree in rounds)
        if self._pool is None:
            return
        within_s = math.inf
        if self._planner.times.is_known:
            within_s = self._planner.times.seconds(self._num_step_rows)
        self._pool.announce(
            [(request, tree, self._ask(request, within_s)) for request, tree in rounds]
        )

    def verified(self, results: Sequence[RoundResult]) -> None:
        """Learn from the outcome."""
        elapsed = self._clock() - self._step_began_at
        num_accepted = sum(len(result.nodes) for result in results)
        self._gain.end(self._planner.times, elapsed, num_accepted)
        self._planner.observe(self._num_step_rows, elapsed)
        for result in results:
            self._num_rounds += 1
            running = self._running.get(result.session_id)
            for origin in result.tree.origins:
                self._num_drafted[origin] += 1
            for node in result.nodes:
                self._num_accepted[result.tree.origins[node]] += 1
            if running is None:
                continue
            for guess in running.guesses:
                running.trust.learn(guess, result.tree, result.nodes)
            self._local.append(result.session_id, result.new_token_ids)
            self._head.append(result.session_id, result.new_token_ids)

    def close(self, session_id: int) -> None:
        """Forget a sequence."""
        running = self._running.pop(session_id, None)
        if running is None:
            return
        self._local.close(session_id)
        self._head.close(session_id)
        if self._pool is not None:
            self._pool.close(session_id)

    def shutdown(self) -> None:
        """Stop the thread and close the links."""
        with self._thread_lock:
            self._is_shut_down = True
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join()
        if self._pool is not None:
            self._pool.shutdown()

    def stats(self) -> SpeculatorStats:
        """A snapshot; may be called from any thread."""
        own = SpeculatorStats(
            num_rounds=self._num_rounds,
            num_table_hits=self._num_table_hits,
            num_table_misses=self._num_table_misses,
            num_pool_draft_tokens=self._num_drafted[DraftOrigin.POOL],
            num_pool_accepted_tokens=self._num_accepted[DraftOrigin.POOL],
            num_local_draft_tokens=self._num_drafted[DraftOrigin.LOCAL],
            num_local_accepted_tokens=self._num_accepted[DraftOrigin.LOCAL],
            num_head_draft_tokens=self._num_drafted[DraftOrigin.HEAD],
            num_head_accepted_tokens=self._num_accepted[DraftOrigin.HEAD],
            num_local_failures=self._local.num_failures + self._head.num_failures,
            num_withheld_draft_tokens=self._num_withheld,
            num_yielded_draft_tokens=self._num_yielded,
            num_targets_met=self._num_targets_met,
            num_targets_missed=self._num_targets_missed,
            step_time_s=self._gain.step_time_s,
            plain_time_s=self._gain.plain_time_s,
        )
        return own if self._pool is None else self._pool.add_to(own)

    def _ask(self, request: DraftRequest, within_s: float) -> Ask:
        """Of the pool, in this round, which will take so long."""
        running = self._running.get(request.session_id)
        if running is not None and not running.asks_pool():
            return NO_ASK
        return Ask(self._config.num_draft_tokens, self._config.fanout, within_s)

    def _local_drafts(self, requests: Sequence[DraftRequest]) -> list[tuple[Guess, ...]]:
        guesses: list[tuple[Guess, ...]] = [()] * len(requests)
        if self._local.drafter is None:
            return guesses
        asking = [index for index, request in enumerate(requests) if self._has_room(request)]
        queries = [
            self._query(requests[index], self._most(requests[index]), _LOCAL_GUESSES)
            for index in asking
        ]
        for index, rows in zip(asking, self._local.ask(queries), strict=True):
            guesses[index] = tuple(
                Guess.of(DraftOrigin.LOCAL, row.token_ids, row.chances, rank)
                for rank, row in enumerate(rows)
            )
        return guesses

    def _with_head(
        self, requests: Sequence[DraftRequest], taken: list[TakenDraft], num_tokens: int
    ) -> list[TakenDraft]:
        """What is at hand, and what the head adds to it where that is worth its time."""
        its = [self._head_chances(request) for request in requests]
        times, drafts = self._planner.times, self._drafts(requests)
        ask = self._head_budget.plan(
            [draft.chances for draft in drafts],
            its,
            self._num_step_rows,
            num_tokens,
            times.seconds if times.is_known else None,
        )
        if not ask.num_passes:
            return taken
        began_at = self._clock()
        answers = self._head.ask(
            [
                self._query(requests[index], min(ask.num_passes, len(its[index])), 1)
                for index in ask.indices
            ]
        )
        elapsed = self._clock() - began_at
        # What the target takes by its rows is learned without the head.
        self._step_began_at += elapsed
        self._head_budget.observe(ask, elapsed)
        for index, rows in zip(ask.indices, answers, strict=True):
            running = self._running[requests[index].session_id]
            if ask.is_probe:
                # Its token alone is what is put to the test.
                running.guesses = ()
                running.make_due()
            own = (Guess.of(DraftOrigin.HEAD, row.token_ids) for row in rows)
            running.guesses = seconded((*running.guesses, *own))
            running.merged = running.trust.merge(running.guesses, self._most(requests[index]))
            taken[index] = replace(taken[index], tree=running.merged.tree)
        return taken

    def _head_chances(self, request: DraftRequest) -> Sequence[float]:
        """Those of its next tokens, as many as may be worth something."""
        if not self._has_room(request):
            return []
        trust = self._running[request.session_id].trust
        length = trust.worth(DraftOrigin.HEAD, self._most(request))
        return trust.chances(places(DraftOrigin.HEAD, length))

    def _has_room(self, request: DraftRequest) -> bool:
        return request.max_draft_tokens > 0 and request.session_id in self._running

    def _query(self, request: DraftRequest, num_tokens: int, fanout: int) -> DraftQuery:
        return DraftQuery(
            session_id=request.session_id,
            token_ids=request.token_ids,
            in_flight=_EMPTY,
            # The bonus token behind the committed text is itself the draft's first token.
            num_draft_tokens=num_tokens - 1,
            fanout=fanout,
            sampling=self._running[request.session_id].spec.sampling,
        )

    def _start_thread(self) -> None:
        with self._thread_lock:
            if self._thread is None and not self._is_shut_down:
                self._thread = threading.Thread(
                    target=self._keep_up, name="draft-links", daemon=True
                )
                self._thread.start()

    def _keep_up(self) -> None:
        pool = self._pool
        while pool is not None and not self._is_shut_down:
            self._wake.wait(_DIAL_INTERVAL_S if pool.is_dialling else _UPKEEP_INTERVAL_S)
            self._wake.clear()
            try:
                for endpoint in pool.upkeep():
                    if self._on_link_lost is not None:
                        self._on_link_lost(endpoint)
            except Exception:
                # The thread's root: links may fail, their upkeep may not.
                logger.exception("upkeep of the draft links failed")


def _targets_s(requests: Sequence[DraftRequest], load: StepLoad) -> dict[int, float]:
    """Targets of the step by the request's place; of sequences that have no draft behind those."""
    targets_s = {
        place: request.tpot_target_s
        for place, request in enumerate(requests)
        if request.tpot_target_s is not None
    }
    return targets_s | dict(enumerate(load.tpot_targets_s, start=len(requests)))

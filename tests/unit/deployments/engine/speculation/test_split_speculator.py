import threading
from dataclasses import replace

import pytest

from deployments.engine.config import SpeculationConfig
from deployments.engine.speculation.draft_service import DraftService
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.load import load_drafter
from deployments.engine.speculation.fake_transport import FakeNetwork
from deployments.engine.speculation.outcome_table import Continuation
from deployments.engine.speculation.pool_client import PoolDraft
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.speculator import (
    NOTHING_ELSE,
    DraftRequest,
    RoundResult,
    StepLoad,
)
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.types import (
    DraftOrigin,
    DraftSampling,
    DraftTree,
    OutcomeRow,
)
from tests.fakes_speculation import (
    IDENTITY,
    VOCAB_SIZE,
    ModelDrafter,
    ToyModel,
    ToyTarget,
    random_text,
    spec_of,
    wait_until,
)

LOOP = [1, 2, 3, 4] * 5


def request(session_id: int, text: list[int], most: int = 8) -> DraftRequest:
    return DraftRequest(session_id=session_id, token_ids=text, max_draft_tokens=most)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        return self.now


def local_only(clock=FakeClock(), **config) -> SplitSpeculator:  # noqa: B008 - it stands still
    return SplitSpeculator(SpeculationConfig(**config), vocab_size=VOCAB_SIZE, clock=clock)


def play(speculator, num_rounds, *, is_right, clock=None, seconds_of=None, load=NOTHING_ELSE):
    """Verify rounds of one looping text; returns the lengths of the drafts."""
    lengths = []
    for _ in range(num_rounds):
        asked = request(1, LOOP)
        [taken] = speculator.take([asked], load)
        lengths.append(len(taken.tree))
        speculator.verifying([(asked, taken.tree)])
        if clock is not None:
            clock.now += seconds_of(load.num_rows + 1 + len(taken.tree))
        nodes = tuple(range(len(taken.tree))) if is_right else ()
        speculator.verified(
            [RoundResult(session_id=1, tree=taken.tree, nodes=nodes, new_token_ids=())]
        )
    return lengths


def test_without_a_pool_the_local_drafter_proposes():
    speculator = local_only(num_draft_tokens=3)
    speculator.open(spec_of(1, LOOP))
    [taken] = speculator.take([request(1, LOOP)])
    assert taken.tree == DraftTree.chain((1, 2, 3), DraftOrigin.LOCAL)
    assert not taken.table_hit
    assert not taken.table_miss


def test_never_more_than_the_request_allows():
    speculator = local_only(num_draft_tokens=8)
    speculator.open(spec_of(1, LOOP))
    for most in range(4):
        assert len(speculator.take([request(1, LOOP, most)])[0].tree) == most


def test_local_drafts_can_be_switched_off():
    speculator = local_only(local_drafter="none")
    speculator.open(spec_of(1, LOOP))
    assert len(speculator.take([request(1, LOOP)])[0].tree) == 0


def test_sessions_never_opened_are_decoded_plainly():
    assert len(local_only().take([request(1, LOOP)])[0].tree) == 0


def test_wrong_drafts_get_shorter_and_right_ones_longer():
    speculator = local_only(num_draft_tokens=4)
    speculator.open(spec_of(1, LOOP))

    assert play(speculator, 30, is_right=False)[-1] == 1
    assert play(speculator, 30, is_right=True)[-1] == 4
    stats = speculator.stats()
    assert stats.num_rounds == 60
    assert 0 < stats.num_local_accepted_tokens < stats.num_local_draft_tokens
    assert stats.num_pool_draft_tokens == 0


def test_drafts_that_cost_more_than_they_give_are_withheld_and_tried_again():
    clock = FakeClock()
    speculator = local_only(clock, num_draft_tokens=4)
    speculator.open(spec_of(1, LOOP))
    linear = {"clock": clock, "seconds_of": lambda rows: 0.01 * rows}
    lengths = play(speculator, 400, is_right=False, **linear)
    assert 0 < sum(lengths[200:]) < 20  # a probe every sixteen rounds
    assert speculator.stats().num_withheld_draft_tokens > 200
    # The text turns predictable, and the machine has room: the probes notice.
    flat = {"clock": clock, "seconds_of": lambda rows: 0.01}
    assert play(speculator, 1000, is_right=True, **flat)[-1] == 4


def test_a_step_that_is_long_anyway_verifies_more():
    clock = FakeClock()
    speculator = local_only(clock, num_draft_tokens=4)
    speculator.open(spec_of(1, LOOP))
    linear = {"clock": clock, "seconds_of": lambda rows: 0.01 * rows}
    alone = play(speculator, 100, is_right=True, **linear)
    beside = play(speculator, 100, is_right=True, load=StepLoad(300, 0), **linear)
    assert sum(alone[50:]) < sum(beside[50:]) == 4 * 50


def learned(clock) -> SplitSpeculator:
    """One that knows steps of ten milliseconds, one more for each row, and right drafts."""
    speculator = local_only(clock, num_draft_tokens=4)
    speculator.open(spec_of(1, LOOP))
    per_row = {"clock": clock, "seconds_of": lambda rows: 0.010 + 0.001 * rows}
    # Plain rounds first, then all widths up to the widest.
    assert play(speculator, 60, is_right=True, **per_row)[-1] == 4
    return speculator


def test_a_target_for_the_time_per_token_narrows_the_step():
    clock = FakeClock()
    speculator = learned(clock)
    alone = speculator.take([request(1, LOOP)])
    assert len(alone[0].tree) == 4
    before = speculator.stats()
    # A sequence that is not drafted for gets one token, in a step of 11 rows at most.
    load = StepLoad(num_rows=0, num_tokens=0, tpot_targets_s=(0.0125,))
    assert len(speculator.take([request(1, LOOP)], load)[0].tree) < 4
    after = speculator.stats()
    assert after.num_targets_met == before.num_targets_met + 1
    assert after.num_yielded_draft_tokens > before.num_yielded_draft_tokens
    assert after.num_withheld_draft_tokens >= after.num_yielded_draft_tokens


def test_a_target_of_its_own_does_not_take_a_sequence_its_drafts():
    speculator = learned(FakeClock())
    for target_s, num_met in ((0.004, 1), (0.001, 0)):
        before = speculator.stats()
        asked = replace(request(1, LOOP), tpot_target_s=target_s)
        assert len(speculator.take([asked])[0].tree) == 4
        after = speculator.stats()
        assert after.num_targets_met - before.num_targets_met == num_met
        assert after.num_targets_missed - before.num_targets_missed == 1 - num_met


class TwoWays(Drafter):
    """As sure of its guess as it is told to be."""

    chances: tuple[float, ...] = ()

    def propose(self, queries):
        return [[OutcomeRow(-1, 1, (2, 3, 4), self.chances)] for _ in queries]


def test_a_drafters_estimates_are_trusted_by_what_they_were_worth():
    drafter = TwoWays()
    speculator = SplitSpeculator(
        SpeculationConfig(num_draft_tokens=4),
        vocab_size=VOCAB_SIZE,
        local_drafter=drafter,
        clock=FakeClock(),
    )
    low, high = (0.45,) * 4, (0.65,) * 4
    speculator.open(spec_of(1, LOOP))
    drafter.chances = low
    assert play(speculator, 200, is_right=False)[-1] == 1
    drafter.chances = high
    assert play(speculator, 20, is_right=True)[-1] == 4
    drafter.chances = low
    assert play(speculator, 1, is_right=False) == [1]
    # A new sequence starts from what the last one taught of each.
    speculator.close(1)
    speculator.open(spec_of(1, LOOP))
    lengths = []
    for drafter.chances in (low, high, (0.67,) * 4):
        [taken] = speculator.take([request(1, LOOP)])
        lengths.append(len(taken.tree))
    assert lengths == [1, 4, 4]


@pytest.mark.parametrize("right", [DraftOrigin.POOL, DraftOrigin.LOCAL])
def test_the_one_that_was_right_before_gets_the_rows(right):
    class Pool:
        def drafts(self, requests):
            return [PoolDraft(Continuation((5, 6, 7)), was_asked=True) for _ in requests]

        def open(self, session): ...

        def announce(self, rounds): ...

        def add_to(self, stats):
            return stats

    speculator = SplitSpeculator(
        SpeculationConfig(num_draft_tokens=3),
        vocab_size=VOCAB_SIZE,
        local_drafter=TwoWays(),
        clock=FakeClock(),
    )
    speculator._pool = Pool()  # the network is not what is looked at here
    speculator.open(spec_of(1, LOOP))
    trees = []
    for _ in range(40):
        asked = request(1, LOOP)
        [taken] = speculator.take([asked])
        assert taken.table_hit
        tree = taken.tree
        trees.append(tree)
        text = (5, 6, 7) if right is DraftOrigin.POOL else (1, 2, 3)
        path = tree.walk(text)
        result = RoundResult(
            session_id=1, tree=tree, nodes=path, new_token_ids=(*text[: len(path)], 9)
        )
        speculator.verified([result])
    assert trees[0].parents[:2] == (-1, -1)  # nothing speaks for one of them yet
    assert set(trees[0].origins) == {DraftOrigin.POOL, DraftOrigin.LOCAL}
    assert trees[-1].is_chain
    assert set(trees[-1].origins) == {right}
    stats = speculator.stats()
    assert stats.num_table_hits == 40
    from_pool, local = stats.num_pool_accepted_tokens, stats.num_local_accepted_tokens
    assert (from_pool, local)[right is DraftOrigin.POOL] == 0
    assert max(from_pool, local) > 100


class BrokenDrafter(Drafter):
    def __init__(self, rows: list[OutcomeRow] | None) -> None:
        self.rows = rows
        self.num_calls = 0

    def propose(self, queries):
        self.num_calls += 1
        if self.rows is None:
            raise KeyError("broken")
        return [self.rows for _ in queries]


@pytest.mark.parametrize("rows", [None, [OutcomeRow(5, 1, ())], [OutcomeRow(-1, VOCAB_SIZE, ())]])
def test_a_failing_local_drafter_is_switched_off_and_costs_nothing(rows):
    drafter = BrokenDrafter(rows)
    speculator = SplitSpeculator(SpeculationConfig(), vocab_size=VOCAB_SIZE, local_drafter=drafter)
    model, sampling = ToyModel(1), DraftSampling(seed=1)
    text = ToyTarget(speculator, model).run({"a": (1, 2, 3)}, sampling, 20)
    assert text["a"] == model.generate((1, 2, 3), sampling, 20)
    assert drafter.num_calls == speculator.stats().num_local_failures == 3


def test_a_local_drafter_that_fails_now_and_then_stays_at_work():
    drafter = BrokenDrafter([])
    speculator = SplitSpeculator(SpeculationConfig(), vocab_size=VOCAB_SIZE, local_drafter=drafter)
    speculator.open(spec_of(1, [1, 2, 3]))
    for number in range(30):
        drafter.rows = [] if number % 3 == 2 else None
        speculator.take([request(1, [1, 2, 3])])
    assert drafter.num_calls == 30
    assert speculator.stats().num_local_failures == 20


def test_a_custom_drafter_works_locally_and_in_the_pool():
    phrase = (1, 2, 3, 4, 5, 6, 7, 8)
    custom = load_drafter("docs.examples.custom_drafter:build")
    speculator = SplitSpeculator(
        SpeculationConfig(num_draft_tokens=4), vocab_size=VOCAB_SIZE, local_drafter=custom
    )
    text = [9, *phrase[:3]]
    speculator.open(spec_of(1, text))
    [taken] = speculator.take([request(1, text)])
    assert taken.tree == DraftTree.chain((4, 5, 6, 7), DraftOrigin.LOCAL)

    pooled, service = over_fake_network(load_drafter("docs.examples.custom_drafter:build"))
    try:
        pooled.attach("r2", "pool:1")
        pooled.open(spec_of(2, text))
        wait_until(lambda: service.step() or service.stats().num_tables == 1, "the prompt's table")
        [taken] = pooled.take([request(2, [*text, 4])])
        assert taken.table_hit
        assert taken.tree == DraftTree.chain((5, 6, 7, 8), DraftOrigin.POOL)
        [taken] = pooled.take([request(2, [*text, 9])])
        assert taken.table_miss
        assert len(taken.tree) == 0
    finally:
        pooled.shutdown()


def over_fake_network(drafter: Drafter) -> tuple[SplitSpeculator, DraftService]:
    """Without delays a fake network needs no clock, so the speculator's own thread may use it."""
    network = FakeNetwork(seed=0)
    service = DraftService(drafter, vocab_size=VOCAB_SIZE)
    network.listen("pool:1", IDENTITY, service.accept, 10_000)
    speculator = SplitSpeculator(
        SpeculationConfig(num_draft_tokens=4, local_drafter="none"),
        vocab_size=VOCAB_SIZE,
        connect=network.connector(IDENTITY),
        limits=LinkLimits(max_frame_tokens=16),
    )
    return speculator, service


def test_a_pool_that_never_has_a_row_is_asked_seldom():
    speculator, service = over_fake_network(BrokenDrafter([]))
    text = random_text(1, 10)
    try:
        speculator.open(spec_of(1, text))
        speculator.attach("r1", "pool:1")
        wait_until(lambda: service.step() or service.stats().num_tables == 1, "the prompt's table")
        for token in random_text(2, 48):
            asked = request(1, text)
            [taken] = speculator.take([asked])
            speculator.verifying([(asked, taken.tree)])
            service.step()
            text.append(token)
    finally:
        speculator.shutdown()
    assert service.stats().num_tables == 1 + 3 + 3


def test_a_long_prompt_is_sent_in_parts_before_the_first_round():
    speculator, service = over_fake_network(ModelDrafter(ToyModel(1)))
    prompt = random_text(1, 100)
    try:
        speculator.open(spec_of(1, prompt))
        speculator.attach("r1", "pool:1")
        wait_until(lambda: service.step() or service.stats().num_tables == 1, "the prompt's table")
        first = ToyModel(1).next_token(prompt, DraftSampling(seed=1))
        [taken] = speculator.take([request(1, [*prompt, first])])
        assert taken.table_hit
        assert service.stats().num_resyncs == 0
    finally:
        speculator.shutdown()


def test_moving_a_request_leaves_the_old_drafter():
    network = FakeNetwork(seed=0)
    services = {}
    for endpoint in ("a:1", "b:1"):
        services[endpoint] = DraftService(ModelDrafter(ToyModel(1)), vocab_size=VOCAB_SIZE)
        network.listen(endpoint, IDENTITY, services[endpoint].accept, 10_000)
    speculator = SplitSpeculator(
        SpeculationConfig(), vocab_size=VOCAB_SIZE, connect=network.connector(IDENTITY)
    )

    def sessions() -> tuple[int, int]:
        for service in services.values():
            service.step()
        return tuple(service.stats().num_sessions for service in services.values())

    try:
        speculator.open(spec_of(1, LOOP))
        speculator.attach("r1", "a:1")
        wait_until(lambda: sessions() == (1, 0), "a serves")
        speculator.attach("r1", "b:1")
        wait_until(lambda: sessions() == (0, 1), "b serves")
        speculator.detach("r1")
        wait_until(lambda: sessions() == (0, 0), "nobody serves")
        assert speculator.stats().num_pool_sessions == 0
    finally:
        speculator.shutdown()


def test_shutdown_ends_the_thread_and_later_calls_do_no_harm():
    before = set(threading.enumerate())
    speculator, _ = over_fake_network(ModelDrafter(ToyModel(1)))
    speculator.attach("r1", "pool:1")
    assert set(threading.enumerate()) - before
    speculator.shutdown()
    assert not set(threading.enumerate()) - before
    speculator.attach("r1", "pool:1")
    speculator.detach("r1")
    speculator.close(1)
    speculator.shutdown()
    assert not set(threading.enumerate()) - before


def test_a_callback_that_raises_does_not_end_the_upkeep():
    calls = []

    def on_lost(endpoint: str) -> None:
        calls.append(endpoint)
        raise RuntimeError("the owner's fault")

    network = FakeNetwork(seed=0)
    speculator = SplitSpeculator(
        SpeculationConfig(),
        vocab_size=VOCAB_SIZE,
        connect=network.connector(IDENTITY),
        on_link_lost=on_lost,
        limits=LinkLimits(backoff_s=0.001, max_backoff_s=0.001),
    )
    try:
        speculator.open(spec_of(1, LOOP))
        speculator.attach("r1", "nobody:1")
        wait_until(lambda: len(calls) >= 2, "redialling goes on")
        assert set(calls) == {"nobody:1"}
    finally:
        speculator.shutdown()


class FakeHead(Drafter):
    """Says the same of every text, in ``seconds`` a pass."""

    def __init__(self, tokens, clock, seconds: float) -> None:
        self.tokens, self.clock, self.seconds = tokens, clock, seconds
        self.asked: list[int] = []
        self.closed: list[int] = []

    def propose(self, queries):
        k = queries[0].num_draft_tokens
        self.asked.append(1 + k)
        self.clock.now += self.seconds * (1 + k)
        return [[OutcomeRow(-1, self.tokens[0], tuple(self.tokens[1 : 1 + k]))] for _ in queries]

    def close(self, session_id):
        self.closed.append(session_id)


def with_head(tokens, seconds: float, **config):
    clock = FakeClock()
    speculator = local_only(clock, num_draft_tokens=4, **config)
    head = FakeHead(tokens, clock, seconds)
    speculator.add_head(head)
    speculator.open(spec_of(1, LOOP))
    return speculator, head, clock


def test_a_head_drafts_where_nothing_else_is_at_hand():
    speculator, head, clock = with_head((9, 8, 7, 6), 0.001, local_drafter="none")
    timing = {"clock": clock, "seconds_of": lambda rows: 0.03}
    assert play(speculator, 60, is_right=True, **timing)[-1] == 4
    stats = speculator.stats()
    assert stats.num_head_accepted_tokens == stats.num_head_draft_tokens > 150
    assert stats.num_local_draft_tokens == 0
    speculator.close(1)
    assert head.closed == [1]


def test_a_head_that_takes_too_long_is_seldom_asked():
    speculator, head, clock = with_head((9, 8, 7, 6), 0.05, local_drafter="none")
    timing = {"clock": clock, "seconds_of": lambda rows: 0.03}
    play(speculator, 400, is_right=True, **timing)
    first, *probes = head.asked
    assert first == 4
    assert 400 // 64 - 1 <= len(probes) <= 400 // 64
    assert set(probes) == {1}


def test_a_wrong_head_is_asked_for_less_and_then_seldom():
    speculator, head, clock = with_head((9, 8, 7, 6), 0.002, local_drafter="none")
    timing = {"clock": clock, "seconds_of": lambda rows: 0.03}
    play(speculator, 600, is_right=False, **timing)
    assert len(head.asked) < 200
    assert set(head.asked[-3:]) == {1}
    assert speculator.stats().num_head_accepted_tokens == 0
    # It is right from now on: the tries notice.
    assert play(speculator, 6000, is_right=True, **timing)[-1] == 4


def test_the_head_s_time_is_not_taken_for_the_target_s():
    speculator, head, clock = with_head((9, 8, 7, 6), 0.01, local_drafter="none")
    timing = {"clock": clock, "seconds_of": lambda rows: 0.03}
    play(speculator, 60, is_right=True, **timing)
    assert len(head.asked) > 40
    assert speculator._planner.times.seconds(5) == pytest.approx(0.03)
    assert speculator._head_budget._times.seconds(1) == pytest.approx(0.01)


def test_a_head_that_says_what_a_copy_says_is_left_alone():
    speculator, _, clock = with_head((1, 2, 3, 4), 0.001)
    timing = {"clock": clock, "seconds_of": lambda rows: 0.03}
    lengths = play(speculator, 600, is_right=True, **timing)
    assert lengths[-1] == 4
    stats = speculator.stats()
    # All that both say counts as the copy's; only in a probe is the head heard alone.
    assert stats.num_head_draft_tokens <= 600 // 64
    assert stats.num_local_accepted_tokens > 1000


def test_a_failing_head_is_switched_off_and_copies_go_on():
    speculator, _, clock = with_head((), 0.001)
    timing = {"clock": clock, "seconds_of": lambda rows: 0.03}
    assert play(speculator, 300, is_right=True, **timing)[-1] == 4
    assert speculator.stats().num_local_failures == 3
    assert speculator._head.drafter is None

"""What every drafter promises, whatever it is made of."""

import pytest

from deployments.engine.speculation.drafters.ask import ask
from deployments.engine.speculation.drafters.load import load_drafter
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from deployments.engine.torch_engine.lm_drafter import CausalLMDrafter
from tests.fakes_speculation import (
    VOCAB_SIZE,
    ModelDrafter,
    ToyModel,
    query_of,
    random_text,
    spec_of,
)
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model

PERIODIC = [*([1, 2, 3, 4, 5, 6, 7, 8] * 6), 1, 2]
CHAIN = DraftTree.chain((3, 4, 5), DraftOrigin.POOL)
TREE = DraftTree((3, 9, 4, 10), (-1, -1, 0, 1))

DRAFTERS = {
    "suffix": lambda: load_drafter("suffix"),
    "custom": lambda: load_drafter("docs.examples.custom_drafter:build"),
    "model": lambda: ModelDrafter(ToyModel(1)),
    "language model": lambda: CausalLMDrafter(loaded_model("llama-of-24-tokens")),
}


@pytest.fixture(params=DRAFTERS)
def make(request):
    return DRAFTERS[request.param]


@pytest.fixture
def drafter(make):
    return make()


@pytest.mark.parametrize("in_flight", [DraftTree(), CHAIN, TREE], ids=["plain", "chain", "tree"])
@pytest.mark.parametrize(("k", "fanout"), [(0, 1), (1, 1), (4, 3)])
def test_rows_answer_the_query(drafter, in_flight, k, fanout):
    drafter.open(spec_of(1, PERIODIC))
    query = query_of(1, PERIODIC, in_flight=in_flight, k=k, fanout=fanout)
    [rows] = drafter.propose([query])
    assert rows
    for row in rows:
        assert -1 <= row.node < len(in_flight)
        assert len(row.draft_token_ids) <= k
        assert all(0 <= token < VOCAB_SIZE for token in (row.bonus_token_id, *row.draft_token_ids))
    for node in range(-1, len(in_flight)):
        bonus = [row.bonus_token_id for row in rows if row.node == node]
        assert len(set(bonus)) == len(bonus)
    assert len(rows) <= fanout * (len(in_flight) + 1)
    assert ask(drafter, [query], VOCAB_SIZE) == ([rows], 0)


def test_answers_come_in_the_order_of_the_queries(drafter):
    texts = {1: PERIODIC, 2: random_text(3, 40), 3: PERIODIC[:-3]}
    for session_id, text in texts.items():
        drafter.open(spec_of(session_id, text))
    queries = [query_of(session_id, text) for session_id, text in texts.items()]
    together = drafter.propose(queries)
    assert len(together) == 3
    assert together == [drafter.propose([query])[0] for query in queries]
    assert drafter.propose(queries[::-1]) == together[::-1]
    assert drafter.propose([]) == []


def test_text_may_grow_between_queries(make):
    grown, fresh = make(), make()
    grown.open(spec_of(1, PERIODIC[:20]))
    grown.propose([query_of(1, PERIODIC[:20])])
    fresh.open(spec_of(1, PERIODIC[:37]))
    query = query_of(1, PERIODIC[:37])
    assert grown.propose([query]) == fresh.propose([query])


def test_unknown_sessions_are_closed_and_appended_in_silence(drafter):
    drafter.close(404)
    drafter.append(404, [1, 2])
    drafter.open(spec_of(1, PERIODIC))
    drafter.close(1)
    drafter.close(1)
    drafter.open(spec_of(2, PERIODIC))
    assert len(drafter.propose([query_of(2, PERIODIC)])) == 1

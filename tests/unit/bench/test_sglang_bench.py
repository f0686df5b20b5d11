"""Bars, pairs and the wrong drafter of ``make bench-sglang``, and its peer's kernels."""

import importlib.util
from pathlib import Path

import pytest
import torch

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.types import DraftQuery, DraftSampling, DraftTree, OutcomeRow
from tests.bench.sglang.bars import hold_bars
from tests.bench.sglang.field import (
    NGRAM,
    NONE,
    POOL,
    SERVED,
    WRONG,
    Entry,
    NotRunningError,
    all_entries,
    reason_in,
)
from tests.bench.sglang.race import Answers, Question, questions, race, rows_of
from tests.bench.sglang.texts import differences
from tests.bench.sglang.wrong import WRONG_TOKEN_ID, WrongDrafter

_KERNELS = Path(__file__).parents[2] / "sglang/shims/sgl_kernel/speculative.py"


def kernels():
    spec = importlib.util.spec_from_file_location("sgl_kernel_speculative", _KERNELS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(seconds, text=(1, 2, 3, 4, 5), **counts):
    counted = {"num_steps": 4, "num_drafted_steps": 0, "num_drafted": 0, "num_accepted": 0}
    times = {"first_at": 10.0, "last_at": 10.0 + seconds, "num_first": 1, "num_from_pool": 0}
    return {"token_ids": list(text)} | times | counted | counts


ASKED = [Question("a", [[7]]), Question("b", [[8], [9]]), Question("a", [[6]])]


def test_no_prompt_is_asked_twice_and_kinds_are_mixed():
    prompts = {"a": [[n] for n in range(10)], "b": [[n] for n in range(10, 20)]}
    found = questions(prompts, [("a", 1, 2), ("b", 3, 2), ("a", 4, 1)])
    assert [(each.kind, each.batch) for each in found] == [
        ("a", 1),
        ("b", 3),
        ("a", 4),
        ("a", 1),
        ("b", 3),
    ]
    asked = [tuple(prompt) for each in found for prompt in each.prompts]
    assert len(set(asked)) == len(asked) == 12


class Scripted:
    """Answers at once, and ends at one of its questions."""

    def __init__(self, name, told, ends_at=None):
        self.entry = Entry(name)
        self._told = told
        self._num_left = ends_at

    def ask(self, do, prompts, num_new_tokens):
        assert do == "generate"
        self._told.append((self.entry.name, prompts[0][0], num_new_tokens))
        if self._num_left == 0:
            raise NotRunningError("status 1")
        if self._num_left is not None:
            self._num_left -= 1
        return [answer(1.0) for _ in prompts]


def test_everybody_is_asked_in_turn_and_who_ends_is_left_out():
    told = []
    contestants = [Scripted(NONE, told), Scripted(POOL, told, ends_at=5)]
    warm_up = [Question("warm-up", [[1]])]
    answers, dead = race(contestants, ASKED, warm_up, 5, 60.0, lambda _: None)
    assert {name: len(own) for name, own in answers.items()} == {NONE: 3, POOL: 1}
    assert dead == {POOL: "status 1"}
    # Prompts are cached first, and the turn to begin goes round.
    assert told[:8] == [
        (NONE, 1, 1),
        (NONE, 1, 5),
        (POOL, 1, 1),
        (POOL, 1, 5),
        (POOL, 7, 1),
        (POOL, 7, 5),
        (NONE, 7, 1),
        (NONE, 7, 5),
    ]
    assert [name for name, *_ in told[8:]] == [NONE, NONE, POOL, POOL, NONE, NONE]
    assert [len(own.found) for own in answers[NONE]] == [1, 2, 1]


def test_no_question_is_asked_when_the_time_is_over():
    said = []
    answers, dead = race([Scripted(NONE, [])], ASKED, [], 5, -1.0, said.append)
    assert (answers, dead) == ({NONE: []}, {})
    assert said == ["out of time after 0 questions"]


def test_rows_compare_at_the_very_same_question():
    answers = {
        NONE: [Answers([answer(2.0)]), Answers([answer(4.0), answer(4.0)]), Answers([answer(1.0)])],
        POOL: [
            Answers([answer(1.0, num_steps=2, num_drafted_steps=2, num_accepted=2)]),
            Answers([answer(4.0), answer(8.0)]),
        ],
    }
    rows = {(row["prompts"], row["contestant"]): row for row in rows_of(ASKED, answers)}
    assert rows["a", NONE]["ratio"] == 1.0
    assert rows["a", POOL]["questions"] == 1
    assert rows["a", POOL]["ratio"] == 2.0
    assert rows["a", POOL]["accept_length"] == 2.0
    assert rows["a", POOL]["tokens_per_step"] == 2.0
    assert rows["b", NONE]["tokens_per_s"] == 2.0
    assert rows["b", POOL]["ratio"] == 0.5
    assert rows["b", POOL]["accept_length"] is None


def row(name, ratios, batch=1, accept_length=None, prompts="MT-bench"):
    return {
        "prompts": prompts,
        "batch": batch,
        "contestant": name,
        "ratios": ratios,
        "accept_length": accept_length,
    }


def test_bars():
    rows = [
        row(WRONG, [0.99, 0.96]),
        row(WRONG, [0.90], prompts="repeating"),
        row(WRONG, [0.94], batch=4),
        row(SERVED, [2.0], prompts="repeating", accept_length=1.6),
        row(SERVED, [2.0], prompts="repeating", accept_length=1.4, batch=4),
    ]
    names = [NONE, SERVED, WRONG, NGRAM]
    bars = hold_bars(names, rows, {SERVED: 0.2, WRONG: 0.4}, {SERVED: 1, WRONG: 0, NGRAM: 5})
    assert {name: (bar["value"], bar["holds"]) for name, bar in bars.items()} == {
        "always wrong drafts against none, batch 1": (0.96, True),
        "always wrong drafts against none, batch 4": (0.94, False),
        f"ms that drafts add to a step: {SERVED}": (0.2, True),
        f"ms that drafts add to a step: {WRONG}": (0.4, False),
        f"texts that differ by more than rounding: {SERVED}": (1, False),
        f"texts that differ by more than rounding: {WRONG}": (0, True),
        f"tokens per verification of repeating prompts: {SERVED}": (1.4, False),
    }


def test_what_a_contestant_that_died_should_have_shown_is_not_passed_over():
    bars = hold_bars([NONE, WRONG], [row(NONE, [1.0])], {}, {})
    assert [bar["holds"] for bar in bars.values()] == [None, None, None]


def test_a_text_that_differs_is_put_down_to_rounding_only_where_it_is():
    answers = {
        NONE: [Answers([answer(1.0)]), Answers([answer(1.0), answer(1.0)])],
        POOL: [Answers([answer(1.0, (1, 2, 9, 4, 5))]), Answers([answer(1.0), answer(1.0, (1,))])],
    }
    gaps = {(7,): 1e-6, (9,): 0.5}
    asked_about = []

    def gap(prompt, output):
        asked_about.append((tuple(prompt), list(output)))
        return gaps[tuple(prompt)]

    found = differences(ASKED, answers, gap)
    assert found[NONE] == []
    assert [(each["token"], each["is_rounding"]) for each in found[POOL]] == [(2, True), (1, False)]
    assert asked_about == [((7,), [1, 2]), ((9,), [1])]


class _Drafter(Drafter):
    def propose(self, queries):
        return [[OutcomeRow(-1, 40, (41, 42)), OutcomeRow(0, 50, ())] for _ in queries]


def test_wrong_drafts_have_rows_that_fit():
    query = DraftQuery(
        session_id=1,
        token_ids=(1, 2),
        in_flight=DraftTree((3,), (-1,)),
        num_draft_tokens=3,
        fanout=2,
        sampling=DraftSampling(seed=0),
    )
    [rows] = WrongDrafter(_Drafter()).propose([query])
    wrong = (WRONG_TOKEN_ID,) * 3
    assert rows == [OutcomeRow(-1, 40, wrong), OutcomeRow(0, 50, wrong)]


def test_the_first_error_of_a_log_is_told():
    lines = [
        "WARNING: nothing",
        "Traceback (most recent call last):",
        '  File "scheduler.py", line 1',
        "sglang.Errors.KernelError: no such kernel",
        "RuntimeError: the scheduler died",
    ]
    assert reason_in(lines) == "sglang.Errors.KernelError: no such kernel"
    assert reason_in(["it said", "Killed"]) == "it said"
    assert reason_in([]) == "it said nothing"


def test_the_contestants_have_names_of_their_own():
    entries = all_entries(4, 2)
    assert len({entry.name for entry in entries}) == len(entries)
    assert entries[0].name == NONE
    assert [entry.name for entry in entries if entry.needs_compiler] == [
        entry.name for entry in entries if NGRAM in entry.name
    ]


#       0
#      / \
#     1   2
#    / \   \
#   3   5   4
PARENTS = (-1, 0, 0, 1, 2, 1)


def mask_of(parents):
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        each = node
        while each >= 0:
            mask[node, each] = True
            each = parents[each]
    return mask


def test_a_tree_is_read_from_its_mask():
    n = len(PARENTS)
    chain = mask_of(tuple(range(-1, n - 1)))
    masks = torch.stack([mask_of(PARENTS), chain]).flatten()
    positions = torch.zeros(2 * n, dtype=torch.int64)
    index, child, sibling = (torch.full((2, n), 77) for _ in range(3))
    kernels().reconstruct_indices_from_tree_mask(
        masks, torch.tensor([10, 20]), positions, index, child, sibling, 2, n
    )
    assert positions.tolist() == [10, 11, 11, 12, 12, 12, *range(20, 26)]
    assert index.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert child.tolist() == [[1, 3, 4, -1, -1, -1], [1, 2, 3, 4, 5, -1]]
    assert sibling.tolist() == [[-1, 2, -1, 5, -1, -1], [-1] * 6]


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ([21, 0, 0, 0, 0, 0], [0, 1]),
        ([22, 0, 24, 0, 0, 0], [0, 2, 4]),
        ([21, 25, 0, 0, 0, 60], [0, 1, 5]),
        ([99, 25, 0, 0, 0, 0], [0]),
    ],
)
def test_the_path_that_the_target_foresaw_is_accepted(said, path):
    n = len(PARENTS)
    tokens = [[20, 21, 22, 23, 24, 25]] * 2
    index = torch.arange(2 * n).view(2, n)
    predicts = torch.zeros(2 * n, dtype=torch.int32)
    accepted = torch.full((2, n), -1, dtype=torch.int32)
    numbers = torch.zeros(2, dtype=torch.int32)
    kernels().verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=numbers,
        candidates=torch.tensor(tokens),
        retrive_index=index,
        retrive_next_token=torch.tensor([[1, 3, 4, -1, -1, -1]] * 2),
        retrive_next_sibling=torch.tensor([[-1, 2, -1, 5, -1, -1]] * 2),
        target_predict=torch.tensor([[5, 5, 5, 5, 5, 5], said]),
    )
    assert numbers.tolist() == [0, len(path) - 1]
    assert accepted[1].tolist() == [n + each for each in path] + [-1] * (n - len(path))
    assert predicts[accepted[1][: len(path)].long()].tolist() == [said[each] for each in path]


def test_slots_of_accepted_nodes_are_listed_in_order():
    slots = torch.arange(100, 112)
    found = torch.zeros(6, dtype=torch.int64)
    accepted = torch.tensor([[0, 2, -1], [6, -1, -1]], dtype=torch.int32)
    kernels().fill_accept_out_cache_loc_cpu(accepted, slots, found)
    assert found.tolist() == [100, 102, 106, 0, 0, 0]
    table = torch.arange(40).view(4, 10)
    kernels().assign_extend_cache_locs_cpu(
        torch.tensor([3, 1]), table, torch.tensor([2, 0]), torch.tensor([4, 3]), found, 10
    )
    assert found.tolist() == [32, 33, 10, 11, 12, 0]

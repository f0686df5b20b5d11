"""Ranks of one target, as real processes: what the first one drafts and chooses is what all do."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial

import torch
from torch import distributed, multiprocessing

from deployments.engine.sglang_engine.draft_ranks import FollowingRounds, LeadingRounds
from deployments.engine.sglang_engine.draft_rounds import DraftRounds, Running
from deployments.engine.sglang_engine.own_params import own_params
from deployments.engine.speculation.speculator import NoSpeculation, TakenDraft
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from tests.fakes_engine import make_request

NUM_RANKS = 3
MAX_NODES = 4
VOCAB_SIZE = 50
NUM_TOKENS = 30
PROMPTS = {"a": [1, 2, 3], "b": [4], "c": [5, 6]}
_PATIENT = timedelta(seconds=300)


def next_token(text, shift=0):
    return (sum(text) * 7 + len(text) + shift) % VOCAB_SIZE


class Branching(NoSpeculation):
    """Now nothing, now the right tokens hidden behind wrong ones."""

    def take(self, requests, load):
        del load
        return [TakenDraft(tree=self._tree(list(request.token_ids))) for request in requests]

    def _tree(self, text):
        if len(text) % 4 == 0:
            return DraftTree()
        first = next_token(text)
        second = next_token([*text, first])
        tokens = ((first + 1) % VOCAB_SIZE, first, (second + 1) % VOCAB_SIZE, second)
        return DraftTree(tokens, (-1, -1, 1, 1), (DraftOrigin.POOL,) * 4)


def generate(rounds, shift=0):
    """What a scheduler does; a shift stands for logits that are not those of the first rank."""
    outputs = {rid: [next_token(prompt)] for rid, prompt in PROMPTS.items()}
    seen = []
    while open_rids := [rid for rid in PROMPTS if len(outputs[rid]) < NUM_TOKENS]:
        batch = [
            Running(rid, own_params(make_request(request_id=rid)), PROMPTS[rid], outputs[rid], 4)
            for rid in open_rids
        ]
        trees = rounds.begin(batch)
        rounds.announce()
        choices = []
        for running, tree in zip(batch, trees, strict=True):
            text = [*running.prompt_ids, *running.output_ids]
            paths = [tree.path_to(node) for node in range(-1, len(tree))]
            choices.append(
                [next_token([*text, *(tree.token_ids[n] for n in path)], shift) for path in paths]
            )
        committed = rounds.end(choices)
        seen.append([(tree.token_ids, tree.parents) for tree in trees])
        seen.append([(one.token_ids, one.nodes) for one in committed])
        for rid, one in zip(open_rids, committed, strict=True):
            outputs[rid] += one.token_ids
            if len(outputs[rid]) >= NUM_TOKENS:
                rounds.leave(rid)
    return outputs, seen


def run_rank(rank, place):
    store = f"file://{place}/store"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=NUM_RANKS, timeout=_PATIENT
    )
    share = partial(distributed.broadcast, src=0)
    if rank == 0:
        own = DraftRounds(Branching(), VOCAB_SIZE, takes_trees=True)
        rounds = LeadingRounds(own, share, MAX_NODES)
    else:
        rounds = FollowingRounds(share, MAX_NODES)
    torch.save(generate(rounds, shift=rank), f"{place}/{rank}")
    distributed.destroy_process_group()
    # The group's threads may still let go of Python objects while the interpreter goes down, which
    # would abort a process whose work is done.
    os._exit(0)


def test_all_ranks_verify_and_commit_what_the_first_one_says(tmp_path):
    multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=NUM_RANKS)
    first, *others = (torch.load(tmp_path / str(rank)) for rank in range(NUM_RANKS))
    alone = DraftRounds(Branching(), VOCAB_SIZE, takes_trees=True)
    assert first == generate(alone)
    assert all(other == first for other in others)
    outputs, _ = first
    plain, _ = generate(DraftRounds(NoSpeculation(), VOCAB_SIZE))
    assert {rid: text[:NUM_TOKENS] for rid, text in outputs.items()} == {
        rid: text[:NUM_TOKENS] for rid, text in plain.items()
    }

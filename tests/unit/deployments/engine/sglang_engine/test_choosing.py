"""Tokens are chosen as the embedded engine chooses them, whoever else is in the batch."""

from __future__ import annotations

import torch

from deployments.engine.sglang_engine.choosing import choose, warm_up
from deployments.engine.sglang_engine.own_params import GREEDY, own_params, sampling_row
from deployments.engine.speculation.noise import row_key
from deployments.engine.torch_engine.drawing import draw_from_all
from deployments.engine.torch_engine.sampling_math import process_logits
from tests.fakes_engine import make_request

VOCAB_SIZE = 997
SAMPLINGS = (
    {"temperature": 0.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2**64 - 1},
    {"temperature": 1.3, "top_k": 40, "seed": 3},
    {"temperature": 1.0, "min_p": 0.05, "seed": 4},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.5, "min_p": 0.2, "seed": 5},
)


def rows_and_expected(logits, positions):
    requests = [
        make_request(choice_index=index % 3, **SAMPLINGS[index % len(SAMPLINGS)])
        for index in range(len(logits))
    ]
    expected = []
    for request, row, position in zip(requests, logits.double(), positions.tolist(), strict=True):
        sampling = request.sampling
        if sampling.is_greedy:
            expected.append(int(row.argmax()))
            continue
        scores = process_logits(
            row[None], [sampling.temperature], [sampling.top_k], [sampling.top_p], [sampling.min_p]
        )
        key = row_key(sampling.seed, request.choice_index, position)
        expected += draw_from_all(scores, [key])
    return [sampling_row(own_params(request)) for request in requests], expected


def test_every_row_is_chosen_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, VOCAB_SIZE, generator=generator) * 3
    positions = torch.arange(40) * 97
    rows, expected = rows_and_expected(logits, positions)
    before = logits.clone()
    assert choose(logits, rows, positions).tolist() == expected
    assert torch.equal(logits, before)
    some = [31, 2, 7]
    chosen = choose(logits[some], [rows[index] for index in some], positions[some])
    assert chosen.tolist() == [expected[index] for index in some]
    assert len(set(expected)) > 20


def test_what_nobody_asked_for_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert choose(logits, [GREEDY], torch.tensor([5])).tolist() == [1]
    warm_up()

"""The torch engine on a GPU. Skipped where torch has none; ``make test-gpu`` says which.

float32 with TF32 off, so that everything can be compared token for token with the CPU's exactness
suites; the last test prints what bfloat16 reaches on the machine.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deployments.engine.config import SpeculationConfig
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from deployments.engine.torch_engine.assembly import EngineParts, build_core
from deployments.engine.torch_engine.cuda_graphs import cuda_graphs
from deployments.engine.torch_engine.eagle3 import Eagle3Config
from deployments.engine.torch_engine.head_drafter import HeadDrafter
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.weights.eagle3 import load_head
from deployments.engine.training.initial import random_head
from deployments.engine.types import FINAL_NORM, CaptureSpec
from tests.fakes_engine import CheckedSpeculator, make_config, make_request
from tests.unit.deployments.engine.torch_engine.tiny_models import (
    CONFIGS,
    batch_of,
    loaded_model,
    reference_logits,
)

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch finds no CUDA device"),
]

TEXT = torch.randint(97, (150,), generator=torch.Generator().manual_seed(5)).tolist()
SLOTS = torch.randperm(8 * 64, generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(autouse=True)
def _exact_arithmetic():
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        yield


def on_gpu(name="llama", dtype="float32"):
    loaded = loaded_model(name, dtype)
    loaded.model.to(DEVICE)
    return loaded


def runner_on_gpu(loaded, config, *, has_graphs, capture_layers=()):
    """A runner and its pool, with a row that padding may write."""
    memory = KVCache(loaded.config, config.num_pages + 1, dtype=loaded.model.dtype, device=DEVICE)
    graphs = None
    if has_graphs:
        graphs = cuda_graphs(
            loaded.model,
            memory,
            max_num_seqs=config.max_num_seqs,
            num_draft_tokens=config.speculation.num_draft_tokens,
            max_context=512,
            capture_layers=capture_layers,
        )
    return ModelRunner(loaded.model, loaded.config, memory, graphs=graphs), memory


def serve(config, requests, *, has_graphs, speculator=None, loaded=None, head=None):
    """The texts and hidden states of all requests, served together."""
    loaded = loaded or on_gpu()
    layers = tuple(set(head.capture_layers)) if head is not None else ()
    runner, memory = runner_on_gpu(loaded, config, has_graphs=has_graphs, capture_layers=layers)
    parts = EngineParts(
        runner=runner,
        memory=memory,
        layout=loaded.page_layout(),
        vocab_size=loaded.config.vocab_size,
        max_positions=loaded.config.max_positions,
        eos_token_ids=frozenset(loaded.config.eos_token_ids),
        store=None,
        speculator=speculator or NoSpeculation(),
        detokenize=lambda token_ids: "".join(chr(64 + token) for token in token_ids),
        head=head,
    )
    core = build_core(config, parts, wake=lambda: None)
    texts = {request.request_id: [] for request in requests}
    states = {request.request_id: [] for request in requests}
    for session_id, request in enumerate(requests):
        core.add(session_id, request)
    is_working = True
    while is_working:
        is_working = core.step()
        for _, delta in core.take_events():
            texts[delta.request_id] += delta.token_ids
            if delta.hidden_states is not None:
                states[delta.request_id].append(delta.hidden_states.values)
        core.check_integrity()
    return texts, states, core.stats()


class KnowingSpeculator(CheckedSpeculator):
    """Hides known text behind wrong siblings, so that accepted rows must be moved."""

    def __init__(self, texts):
        super().__init__()
        self._texts = texts
        self._requests = {}

    def open(self, session):
        super().open(session)
        self._requests[session.session_id] = (session.request_id, len(session.token_ids))

    def draft(self, session_id, token_ids, max_draft_tokens):
        request_id, num_prompt_tokens = self._requests[session_id]
        known = self._texts[request_id][len(token_ids) - num_prompt_tokens :]
        tokens, parents, right = [], [], -1
        for token in known:
            for guess in ((token + 1) % 97, token):
                if len(tokens) < max_draft_tokens:
                    tokens.append(guess)
                    parents.append(right)
            right = len(tokens) - 1
        return DraftTree(tuple(tokens), tuple(parents), (DraftOrigin.POOL,) * len(tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    loaded = on_gpu(name)
    cache = KVCache(loaded.config, 8, dtype=torch.float32, device=DEVICE)
    runner = ModelRunner(loaded.model, loaded.config, cache)
    got = []
    for start, end in ((0, 100), (100, 145), *((at, at + 1) for at in range(145, 150))):
        part = (TEXT[start:end], range(start, end), SLOTS[start:end], SLOTS[:start], None)
        got.append(runner.forward(batch_of(part)).cpu())
    torch.testing.assert_close(torch.cat(got), reference_logits(name, TEXT), rtol=1e-3, atol=1e-3)


def requests(temperature=0.0, **changes):
    return [
        make_request(
            f"r{n}", TEXT[: 20 + 31 * n], max_tokens=60, temperature=temperature, **changes
        )
        for n in range(4)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_and_speculation_do_not_change_the_text(temperature):
    config = make_config(max_batch_tokens=64, num_draft_tokens=6)
    plain, _, _ = serve(config, requests(temperature), has_graphs=False)
    recorded, _, _ = serve(config, requests(temperature), has_graphs=True)
    assert recorded == plain
    speculator = KnowingSpeculator(plain)
    drafted, _, stats = serve(config, requests(temperature), has_graphs=True, speculator=speculator)
    assert drafted == plain
    assert stats.speculation.num_accepted_draft_tokens > 60


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_head_beside_the_model_does_not_change_the_text(has_graphs, temperature, tmp_path):
    config = make_config(max_batch_tokens=64, num_draft_tokens=4)
    loaded = on_gpu("llama-of-6-layers")
    plain, _, _ = serve(config, requests(temperature), has_graphs=has_graphs, loaded=loaded)
    shape = Eagle3Config.for_target(loaded.config, 40)
    random_head(shape, torch.arange(0, 80, 2), seed=1).save(tmp_path)
    head = HeadDrafter(load_head(tmp_path, loaded.model), loaded.model, config.num_pages)
    head.warm_up()
    drafted, _, stats = serve(
        config,
        requests(temperature),
        has_graphs=has_graphs,
        # On a clock that stands still, all that the head drafts is verified.
        speculator=SplitSpeculator(
            SpeculationConfig(local_drafter="none"), vocab_size=97, clock=lambda: 0.0
        ),
        loaded=loaded,
        head=head,
    )
    assert drafted == plain
    assert stats.speculation.num_draft_tokens > 60


def test_preemption_and_penalties_work_on_the_gpu():
    settings = {"frequency_penalty": 0.4, "top_p": 0.9, "top_k": 20, "logit_bias": ((4, 1.0),)}
    roomy, _, _ = serve(make_config(), requests(1.0, **settings), has_graphs=True)
    tight = make_config(num_pages=7, max_batch_tokens=64)
    texts, _, stats = serve(tight, requests(1.0, **settings), has_graphs=True)
    assert stats.num_preemptions > 0
    assert texts == roomy


def test_hidden_states_are_delivered_beside_graphs():
    capture = CaptureSpec(layers=(1, FINAL_NORM))
    wanted = requests(capture=capture)
    _, states, _ = serve(make_config(), wanted, has_graphs=True)
    for request in wanted:
        values = np.concatenate(states[request.request_id], axis=1)
        assert values.shape == (2, len(request.prompt_token_ids) + 59, 64)
        assert np.isfinite(values).all()


def test_a_graph_computes_what_the_launched_kernels_do():
    config = make_config(max_num_seqs=4)
    loaded = on_gpu("qwen3")
    (recorded, memory), (launched, other) = (
        runner_on_gpu(loaded, config, has_graphs=has_graphs) for has_graphs in (True, False)
    )
    for runner in (recorded, launched):
        runner.forward(batch_of((TEXT[:100], range(100), SLOTS[:100], [], None)))
    for at in range(100, 130):
        batch = batch_of((TEXT[at : at + 1], [at], SLOTS[at : at + 1], SLOTS[:at], None))
        torch.testing.assert_close(
            recorded.forward(batch), launched.forward(batch), rtol=1e-4, atol=1e-4
        )
    own = config.num_pages * 64
    torch.testing.assert_close(memory.k[:, :own], other.k[:, :own], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_survive_the_way_through_the_host(dtype):
    config = loaded_model().config
    first, second = (KVCache(config, 3, dtype=dtype, device=DEVICE) for _ in range(2))
    first.k.normal_()
    first.v.normal_()
    pages = [first.read_page(page) for page in range(3)]
    for page in range(3):
        second.write_page(page, pages[page])
    assert torch.equal(first.k, second.k)
    assert torch.equal(first.v, second.v)
    assert all(np.array_equal(second.read_page(page), pages[page]) for page in range(3))


def test_bfloat16_speed_is_printed():
    """No bar: it shows what graphs gain on this machine."""
    config = make_config(num_pages=64, max_num_seqs=8)
    wanted = [make_request(f"r{n}", TEXT[:64], max_tokens=200) for n in range(8)]
    for has_graphs in (False, True):
        loaded = on_gpu(dtype="bfloat16")
        texts, _, stats = serve(config, wanted, has_graphs=has_graphs, loaded=loaded)
        kind = "recorded" if has_graphs else "launched"
        print(f"{kind}: {1000 * stats.step_time_ewma_s:.2f} ms per step of 8")  # noqa: T201
        assert all(len(text) == 200 for text in texts.values())

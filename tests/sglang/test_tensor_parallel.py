"""The real SGLang in several ranks that share one target's layers, drafted for by a real pool."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

from cluster.local_cluster import STOP_TIMEOUT_S
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.tokenizer import ChatTurn, Tokenizer
from protos import inference_pb2_grpc as pb_grpc
from tests.exactness import Reference, assert_same_text
from tests.ray_cluster import wait_until
from tests.sglang.embedded import by_the_embedded_engine
from tests.sglang.served import PYTHON, served
from tests.sglang.test_drafting import GREEDY, MAX_TOKENS, REPEATING, SAMPLED, ask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from protos import inference_pb2 as pb
    from tests.integration.cluster.cluster_process import ClusterProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="make test-sglang runs it"),
]

NUM_RANKS = 2


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    engine = {
        "speculation": {"local_drafter": "none"},
        "sglang": {
            "python": PYTHON,
            "attention_backend": "torch_native",
            "tensor_parallel": NUM_RANKS,
        },
    }
    place = tmp_path_factory.mktemp("cluster")
    with served(place, folder, engine, draft={"drafter": "suffix"}) as process:
        yield process


def schedulers(cluster: ClusterProcess) -> list[str]:
    names = (process.name() for process in cluster.processes())
    return [name for name in names if name.startswith("sglang::sched")]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ranks_that_are_drafted_for_give_the_text_of_one(
    cluster: ClusterProcess, folder: Path, sampling: dict[str, float]
) -> None:
    assert len(schedulers(cluster)) == NUM_RANKS
    drafted: list[pb.GenerateResponse] = []
    with grpc.insecure_channel(cluster.state.grpc_address) as channel:
        rpc = pb_grpc.InferenceStub(channel)

        def are_drafted() -> bool:
            """Links may come up too late for the first texts."""
            with ThreadPoolExecutor(4) as threads:
                drafted[:] = threads.map(
                    lambda question: ask(rpc, question, sampling, is_drafted=True), REPEATING
                )
            return any(answer.speculation.num_accepted_pool_tokens for answer in drafted)

        wait_until(are_drafted, timeout_s=600, what="accepted tokens of the pool")
    tokenizer = Tokenizer.load(folder)
    requests = [
        GenerationRequest(
            request_id=question,
            prompt_token_ids=tuple(tokenizer.encode_chat([ChatTurn("user", question)])),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=11, **sampling),
        )
        for question in REPEATING
    ]
    expected = asyncio.run(by_the_embedded_engine(requests, folder, tokenizer))
    actual = {
        question: list(answer.choices[0].token_ids)
        for question, answer in zip(REPEATING, drafted, strict=True)
    }
    assert sum(map(len, expected.values())) > MAX_TOKENS
    assert_same_text(Reference(default_cache_dir()), requests, expected, actual)


def test_a_stop_leaves_no_rank(cluster: ClusterProcess) -> None:
    cluster.signal(signal.SIGTERM)
    assert cluster.wait(STOP_TIMEOUT_S) == 0
    assert not cluster.processes()

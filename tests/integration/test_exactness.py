"""Whatever drafters and the network do, the default model writes its own text (float32).

The drafter here knows the plain text, so that drafts of every length are accepted; the hostile ones
lie, and the network between the real gRPC ends delays, duplicates, reorders, drops or dies. Heads
beside the model have learned nothing, or a little.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.speculator import NOTHING_ELSE, NoSpeculation
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.transport import Received, TargetTransport, TransportState
from deployments.engine.speculation.types import OutcomeRow
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from tests.exactness import Reference, assert_same_text
from tests.heads import write_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.speculation.types import DraftQuery

pytestmark = pytest.mark.integration

SECRET = SecretStr("of this test")
IDENTITY = Identity(model="smollm2-135m-instruct", vocab_size=49152, vocab_digest="same")
MAX_TOKENS = 24
_PATIENT_STEPS = 2
QUESTIONS = [
    "List three uses of a paper clip.",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "Count from one to ten in words.",
    "What is 17 times 3? Explain.",
    "Name the planets.",
]
CONFIG = TorchEngineConfig(
    dtype="float32", num_threads=2, num_pages=64, max_num_seqs=8, max_batch_tokens=256
)


@pytest.fixture(scope="module")
def cache_dir():
    directory = default_cache_dir()
    prepare_builtin(directory, print)
    return directory


@pytest.fixture(scope="module")
def reference(cache_dir):
    return Reference(cache_dir)


def make_requests(cache_dir, temperature: float) -> list[GenerationRequest]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache_dir / "models" / "smollm2-135m-instruct")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    return [
        GenerationRequest(
            request_id=f"q{number}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=MAX_TOKENS,
                seed=100 + number,
                temperature=temperature,
                top_p=1.0 if number % 2 else 0.9,
                presence_penalty=0.5 if number == 3 else 0.0,
                repetition_penalty=1.1 if number == 4 else 1.0,
            ),
        )
        for number, prompt in enumerate(prompts)
    ]


def start_engine(cache_dir, speculator, config=CONFIG):
    return build_engine(
        config,
        cache_dir=cache_dir,
        page_store_factory=None,
        speculator=speculator,
        detokenize=lambda token_ids: "",
    )


async def texts(engine, requests, *, at_once: bool) -> dict[str, list[int]]:
    async def one(request):
        output: list[int] = []
        num_ends = 0
        async for delta in engine.generate(request):
            output.extend(delta.token_ids)
            num_ends += delta.finish_reason is not None
        assert num_ends == 1
        return request.request_id, output

    if at_once:
        return dict(await asyncio.gather(*(one(request) for request in requests)))
    return dict([await one(request) for request in requests])


@pytest.fixture(scope="module")
def plain(cache_dir) -> dict[float, dict[str, list[int]]]:
    """The text without speculation, one request at a time."""

    async def run() -> dict[float, dict[str, list[int]]]:
        engine = start_engine(cache_dir, NoSpeculation())
        try:
            return {
                temperature: await texts(
                    engine, make_requests(cache_dir, temperature), at_once=False
                )
                for temperature in (0.0, 1.0)
            }
        finally:
            await engine.close()

    return asyncio.run(run())


class OracleDrafter(Drafter):
    """Knows the texts. ``honesty`` is the chance that a drafted token is the right one.

    Its bonus tokens are always right, so that its rows are found and its lies are verified.
    """

    def __init__(self, whole_texts: Sequence[Sequence[int]], honesty: float) -> None:
        self._texts = [list(text) for text in whole_texts]
        self._honesty = honesty
        self._rng = random.Random(5)  # noqa: S311 - reproducible on purpose

    def _guess(self, committed: list[int], num_tokens: int) -> list[int]:
        for text in self._texts:
            if text[: len(committed)] == committed:
                truth = text[len(committed) : len(committed) + num_tokens]
                return truth[:1] + [
                    token if self._rng.random() < self._honesty else (token + 1) % 49152
                    for token in truth[1:]
                ]
        return [7] * num_tokens

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        answers = []
        for query in queries:
            rows = []
            for node in range(-1, len(query.in_flight)):
                path = [query.in_flight.token_ids[n] for n in query.in_flight.path_to(node)]
                guess = self._guess([*query.token_ids, *path], query.num_draft_tokens + 1)
                if guess:
                    rows.append(OutcomeRow(node, guess[0], tuple(guess[1:])))
            answers.append(rows)
        return answers


class PatientSpeculator(SplitSpeculator):
    """Its first steps wait for tables: a machine may decode these few tokens faster than it dials.

    Args:
        num_frames: how many frames with tables have arrived.
        before_step: called with the number of the step, from 1, on the engine's thread.
    """

    def __init__(self, *args, num_frames, before_step, **fields) -> None:
        super().__init__(*args, **fields)
        self._num_frames = num_frames
        self._before_step = before_step
        self._num_steps = 0

    def take(self, requests, load=NOTHING_ELSE):
        if requests:
            self._num_steps += 1
            self._before_step(self._num_steps)
        if requests and self._num_steps <= _PATIENT_STEPS:
            deadline = time.monotonic() + 20
            while self._num_frames() < self._num_steps and time.monotonic() < deadline:
                self._pool.drafts([])
                time.sleep(0.001)
        return super().take(requests, load)


class FaultyTransport(TargetTransport):
    """A real stream whose arriving frames meet with a fault."""

    def __init__(self, inner: TargetTransport, fault: str, on_frame: Callable[[], None]) -> None:
        self._inner = inner
        self._on_frame = on_frame
        self._fault = fault
        self._held: list[Received] = []

    def send(self, frame) -> bool:
        return self._inner.send(frame)

    def receive(self):
        arrived = self._inner.receive()
        for received in arrived:
            if received.frame.tables:
                self._on_frame()
        if self._fault == "late":
            arrived, self._held = self._held, arrived
        elif self._fault == "duplicated":
            arrived, self._held = [*arrived, *self._held, *arrived], arrived
        elif self._fault == "reordered":
            arrived = (self._held + arrived)[::-1]
            self._held, arrived = arrived[:1], arrived[1:]
        elif self._fault == "dropped":
            arrived = arrived[::2]
        return arrived

    def close(self) -> None:
        self._inner.close()

    @property
    def state(self) -> TransportState:
        return self._inner.state

    @property
    def num_dropped(self) -> int:
        return self._inner.num_dropped

    @property
    def welcome(self):
        return self._inner.welcome

    @property
    def refusal(self):
        return self._inner.refusal


async def speculate(cache_dir, requests, plain_texts, fault: str, *, at_once: bool):
    honesty = {"wrong": 0.0, "half right": 0.6}.get(fault, 1.0)
    whole = [[*r.prompt_token_ids, *plain_texts[r.request_id]] for r in requests]
    server = DraftServer(OracleDrafter(whole, honesty), IDENTITY, SECRET)
    endpoint = f"127.0.0.1:{server.start()}"
    dial = grpc_connector(IDENTITY, "target", SECRET)
    frames: list[None] = []

    def before_step(number: int) -> None:
        if fault == "killed" and number == _PATIENT_STEPS + 1:
            server.close()

    speculator = PatientSpeculator(
        SpeculationConfig(num_draft_tokens=4, fanout=1),
        vocab_size=IDENTITY.vocab_size,
        connect=lambda to: FaultyTransport(dial(to), fault, lambda: frames.append(None)),
        limits=LinkLimits(backoff_s=0.02, max_backoff_s=0.1),
        num_frames=lambda: len(frames),
        before_step=before_step,
    )
    engine = start_engine(cache_dir, speculator)
    try:
        for request in requests:
            speculator.attach(request.request_id, endpoint)
        return await texts(engine, requests, at_once=at_once), speculator.stats()
    finally:
        await engine.close()
        await asyncio.to_thread(server.close)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "fault",
    ["none", "half right", "wrong", "late", "duplicated", "reordered", "dropped", "killed"],
)
async def test_batched_speculation_writes_the_plain_text(
    cache_dir, plain, reference, fault, temperature
):
    requests = make_requests(cache_dir, temperature)
    output, stats = await speculate(cache_dir, requests, plain[temperature], fault, at_once=True)
    assert_same_text(reference, requests, plain[temperature], output)
    assert stats.num_pool_draft_tokens > 0
    if fault == "wrong":
        assert stats.num_pool_accepted_tokens == 0
    elif fault != "killed":
        assert stats.num_pool_accepted_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fault", ["none", "wrong", "late", "killed"])
async def test_single_speculation_writes_the_plain_text(
    cache_dir, plain, reference, fault, temperature
):
    requests = make_requests(cache_dir, temperature)[:1]
    output, stats = await speculate(cache_dir, requests, plain[temperature], fault, at_once=False)
    expected = {r.request_id: plain[temperature][r.request_id] for r in requests}
    assert_same_text(reference, requests, expected, output)
    assert stats.num_table_hits > 0


@pytest.fixture(scope="module")
def heads(cache_dir, plain, tmp_path_factory):
    """Folders by name; the fitted one has read the greedy texts."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("random", "fitted")}
    texts_read = [
        [*request.prompt_token_ids, *plain[0.0][request.request_id]]
        for request in make_requests(cache_dir, 0.0)
    ]
    write_heads(cache_dir, texts_read, **folders)
    return folders


@pytest.mark.parametrize(
    ("name", "at_once", "temperature"),
    [("random", True, 1.0), ("fitted", True, 0.0), ("fitted", False, 1.0)],
)
async def test_a_head_beside_the_model_writes_the_plain_text(
    cache_dir, plain, reference, heads, name, at_once, temperature
):
    speculation = SpeculationConfig(head=str(heads[name]), local_drafter="none")
    # On a clock that stands still, all that the head drafts is verified.
    speculator = SplitSpeculator(speculation, vocab_size=49152, clock=lambda: 0.0)
    config = CONFIG.model_copy(update={"speculation": speculation})
    engine = start_engine(cache_dir, speculator, config)
    requests = make_requests(cache_dir, temperature)
    if not at_once:
        requests = requests[:2]
    try:
        output = await texts(engine, requests, at_once=at_once)
    finally:
        await engine.close()
    expected = {r.request_id: plain[temperature][r.request_id] for r in requests}
    assert_same_text(reference, requests, expected, output)
    stats = speculator.stats()
    assert stats.num_head_draft_tokens > 30
    if name == "fitted":
        assert stats.num_head_accepted_tokens > 0

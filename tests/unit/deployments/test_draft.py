from __future__ import annotations

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import ray
import torch
from pydantic import SecretStr
from transformers import LlamaConfig, LlamaForCausalLM

from deployments import draft as draft_module
from deployments.config import DraftPoolConfig, TracingConfig
from deployments.draft import DraftReplica
from deployments.drafters import max_text_tokens
from deployments.engine.config import EngineConfig, TorchEngineConfig
from deployments.engine.speculation import draft_session
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.errors import DrafterDeadError
from deployments.engine.speculation.grpc_transport import GrpcTransport
from deployments.engine.speculation.transport import TransportState
from deployments.engine.speculation.types import OutcomeRow
from deployments.engine.torch_engine.student import StudentWeights, save_student, write_student
from deployments.engine.torch_engine.student_shelf import StudentShelf
from deployments.engine.torch_engine.weights.loader import load_model
from protos import draft_pb2
from tests.fakes_metrics import exporter_for
from tests.fakes_speculation import wait_until
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from deployments.engine.speculation.types import DraftQuery, SessionSpec
    from deployments.engine.torch_engine.weights.loader import LoadedModel

SECRET = SecretStr("pool-secret")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


@pytest.mark.parametrize(
    ("engine", "drafter", "num_tokens"),
    [
        (EngineConfig(), "student", 640),
        (EngineConfig(), "model:/some/where", 640),
        (EngineConfig(), "suffix", 1000),
        (EngineConfig(), f"{__name__}:SevenDrafter", 1000),
        (EngineConfig(kind="simulated"), "student", 1000),
    ],
)
def test_a_text_is_not_too_long_for_the_pages_of_a_language_model(
    engine: EngineConfig, drafter: str, num_tokens: int
) -> None:
    draft = DraftPoolConfig(drafter=drafter, num_pages=10, max_session_tokens=1000)
    assert max_text_tokens(draft, engine) == num_tokens


class SevenDrafter(Drafter):
    """Proposes sevens behind a text it has seen open."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def open(self, session: SessionSpec) -> None:
        self._lengths[session.session_id] = len(session.token_ids)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        return [[OutcomeRow(-1, 7, (7,) * self._lengths[query.session_id])] for query in queries]


def no_drafter() -> Drafter:
    raise KeyError("no phrases")


def tiny_target(folder: Path) -> LoadedModel:
    """A model of six layers in a tokenizer's folder."""
    torch.manual_seed(3)
    shape = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return load_model(str(folder), dtype="float32", cache_dir=folder)


def student_of(target: LoadedModel, seed: int) -> StudentWeights:
    return StudentWeights(
        connector_weight=torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)),
        connector_bias=torch.zeros(32),
        draft_token_ids=torch.arange(264, dtype=torch.int32),
        logit_scale=1.0,
        kept_layers=(0, 1, 4, 5),
        joint=2,
        target_digest=target.weights_digest,
        num_positions=1,
        agreement=None,
    )


class Replica(DraftReplica):
    def __del__(self) -> None:
        """Not when it is collected: the hook is a coroutine, and the fixture has awaited it."""


@asynccontextmanager
async def draft_replica(
    folder: Path, monkeypatch: pytest.MonkeyPatch, drafter: str = "suffix"
) -> AsyncIterator[DraftReplica]:
    """Built and shut down as Serve does it."""
    if not (folder / "model").exists():
        write_tokenizer(folder / "model")
    replica = Replica.__new__(Replica)
    await DraftReplica.__init__(
        replica,
        engine=TorchEngineConfig(model=str(folder / "model")),
        draft=DraftPoolConfig(drafter=drafter, secret=SECRET),
        cache_dir=folder,
        tracing=TracingConfig(exporter="file", file_path=folder / "spans"),
    )
    assert replica._tracing._provider is not None
    # The process keeps the first provider it was given, which may be another test's.
    tracer = replica._tracing._provider.get_tracer("test")
    monkeypatch.setattr(draft_session, "tracer", tracer)
    try:
        yield replica
    finally:
        await DraftReplica.__del__(replica)


async def test_serve_learns_of_a_drafter_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draft_replica(tmp_path, monkeypatch) as replica:
        replica.check_health()
        assert await replica() == replica.record_replica_metadata()["draft_endpoint"]
    with pytest.raises(DrafterDeadError):
        replica.check_health()


def open_session(replica: DraftReplica) -> GrpcTransport:
    """Dial as a target does, open one session and get one table for it."""
    endpoint = replica.record_replica_metadata()["draft_endpoint"]
    target = GrpcTransport(endpoint, replica._identity.hello("t"), SECRET)
    wait_until(lambda: target.state is not TransportState.CONNECTING, "an answer to the hello")
    opening = draft_pb2.Open(
        session=1,
        epoch=1,
        token_ids=[1, 2, 1, 2],
        sampling=draft_pb2.Sampling(top_p=1),
        traceparent=TRACEPARENT,
    )
    commit = draft_pb2.Commit(session=1, epoch=1, round=1, base_len=4, num_draft_tokens=2, fanout=1)
    target.send(draft_pb2.TargetFrame(opens=[opening], commits=[commit]))
    wait_until(lambda: replica._server.stats().num_tables == 1, "a table")
    return target


async def test_as_many_targets_are_served_as_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draft_replica(tmp_path, monkeypatch) as replica:
        endpoint, hello = await replica(), replica._identity.hello("t")
        targets = [GrpcTransport(endpoint, hello, SECRET) for _ in range(70)]
        wait_until(lambda: all(target.is_alive for target in targets), "a welcome for each")
        for target in targets:
            target.close()


async def test_spans_of_sessions_that_the_shutdown_ends_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draft_replica(tmp_path, monkeypatch) as replica:
        target = open_session(replica)
    target.close()
    (path,) = (tmp_path / "spans").iterdir()
    (span,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert span["name"] == "draft.session"
    assert span["context"]["trace_id"] == "0x0af7651916cd43dd8448eb211c80319c"
    assert span["resource"]["attributes"]["service.name"] == "paceline-draft"
    assert span["attributes"]["paceline.tables"] == 1


async def test_the_server_s_snapshot_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_module, "_REPORT_PERIOD_S", 0.001)
    exporter = exporter_for(monkeypatch)
    async with draft_replica(tmp_path, monkeypatch) as replica, asyncio.timeout(60):
        target = open_session(replica)
        while exporter.scrape().get(("draft_server_tables_total",)) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    target.close()


async def test_a_round_of_reports_that_fails_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(draft_module, "_REPORT_PERIOD_S", 0.001)
    failures = [RuntimeError("out of memory")] * 3
    polled = threading.Event()

    def poll() -> None:
        if failures:
            raise failures.pop()
        polled.set()

    async with draft_replica(tmp_path, monkeypatch) as replica:
        monkeypatch.setattr(replica, "_refresh", SimpleNamespace(poll=poll))
        assert await asyncio.to_thread(polled.wait, 60)
    assert caplog.text.count("RuntimeError: out of memory") == 3


async def test_another_drafter_goes_on_with_the_sessions_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draft_replica(tmp_path, monkeypatch) as replica:
        target = open_session(replica)
        await replica.reconfigure({"drafter": f"{__name__}:SevenDrafter"})
        commit = draft_pb2.Commit(
            session=1, epoch=1, round=2, base_len=5, committed=[3], num_draft_tokens=4, fanout=1
        )
        target.send(draft_pb2.TargetFrame(commits=[commit]))
        wait_until(lambda: replica._server.stats().num_tables == 2, "a table of the successor")
        frames: list[draft_pb2.DraftFrame] = []
        wait_until(
            lambda: (
                frames.extend(got.frame for got in target.receive())
                or any(table.round == 2 for frame in frames for table in frame.tables)
            ),
            "its arrival",
        )
        (table,) = frames[-1].tables
        assert list(table.rows[0].draft_token_ids) == [7] * 4
        assert not any(frame.drops for frame in frames)
    target.close()


@pytest.mark.parametrize(
    "name", ["nowhere.to:BeFound", f"{__name__}:no_drafter", "model:/nowhere", "student"]
)
async def test_a_drafter_that_cannot_be_had_leaves_the_old_one_at_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    async with draft_replica(tmp_path, monkeypatch) as replica:
        await replica.reconfigure({"drafter": name})
        assert "suffix stays at work" in caplog.text
        open_session(replica).close()


async def test_a_language_model_of_another_vocabulary_never_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_tokenizer(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    # The same number of tokens, two of which have changed places.
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    async with draft_replica(tmp_path, monkeypatch) as replica:
        await replica.reconfigure({"drafter": f"model:{other}"})
        assert "has another vocabulary" in caplog.text
        assert "suffix stays at work" in caplog.text
        open_session(replica).close()


async def test_a_student_that_is_put_on_the_shelf_is_tried_while_the_replica_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_module, "_REPORT_PERIOD_S", 0.01)
    target = tiny_target(write_tokenizer(tmp_path / "model"))
    shelf = StudentShelf(tmp_path, target.weights_digest)
    save_student(student_of(target, seed=1), tmp_path)
    exporter = exporter_for(monkeypatch)

    async def running(trials: int) -> None:
        async with asyncio.timeout(60):
            while exporter.scrape().get(("draft_trial_running",), 0) != trials:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async with draft_replica(tmp_path, monkeypatch, drafter="student") as replica:
        shelf.offer(write_student(student_of(target, seed=2), tmp_path / "new.safetensors"))
        await running(1)
        dialled = open_session(replica)
        assert dialled.welcome is not None
        assert dialled.welcome.max_session_tokens == 256 * 64
        dialled.close()
        shelf.offer(
            write_student(replace(student_of(target, seed=2), target_digest="f00d"), tmp_path / "x")
        )
        await running(0)
        decision = shelf.last_decision()
        assert decision is not None
        assert "was cut from f00d" in decision.reason
        replica.check_health()


async def test_nothing_else_can_be_changed_while_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with draft_replica(tmp_path, monkeypatch) as replica:
        with pytest.raises(ValueError, match="num_threads"):
            await replica.reconfigure({"drafter": "suffix", "num_threads": "2"})

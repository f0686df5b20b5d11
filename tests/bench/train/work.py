"""What is timed: the stages of a training, each through the code that a job runs."""

from __future__ import annotations

import asyncio
import copy
import shutil
import time
from contextlib import closing
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from deployments.engine.config import TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.weights.loader import load_model
from deployments.engine.training.answers import AnswerLog, Question, regenerate
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.config import DraftTrainingConfig
from deployments.engine.training.feature_store import FeatureStore
from deployments.engine.training.initial import draft_vocabulary
from deployments.engine.training.methods import method_of
from deployments.engine.training.objective import DraftObjective
from deployments.engine.training.online import OnlineTexts
from deployments.engine.training.plan import WholePlan
from deployments.engine.training.run import Texts
from deployments.engine.training.trainer import DraftTrainer
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.model_files import model_folder
from deployments.tokenizer import ChatTurn, Tokenizer
from kv_store.layout import PAGE_TOKENS
from tests.bench.train.flops import attention_flops, counted, head_flops, layer_flops, text_flops
from tests.bench.train.machine import PeakMemory, forget

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from deployments.engine.base import Engine
    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.methods import Start

_TEXTS_PER_SHARD = 8
_MAX_BYTES = 1 << 40
_MAX_LENGTH = 512


class Timed(NamedTuple):
    """What a stage did.

    Attributes:
        flops: of its matrix products.
    """

    num_tokens: int
    seconds: float
    flops: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / self.seconds


class Trained(NamedTuple):
    """A training from answers to weights.

    Attributes:
        seconds: of all of it.
        parts: seconds and bytes of what it consists of.
        peak_bytes: of resident memory.
        grown_bytes: of those, beyond what was there before.
    """

    num_tokens: int
    seconds: float
    parts: dict[str, float]
    peak_bytes: int
    grown_bytes: int
    weights: dict[str, Tensor]


class _Texts(Texts, Protocol):
    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""


class _Kept:
    """Texts in memory: training alone, without reading or computing features."""

    def __init__(self, texts: Sequence[FeatureText]) -> None:
        self._texts = texts
        self.lengths = [text.num_tokens for text in texts]

    def stream(self, indices: Iterable[int]) -> Generator[FeatureText, None, None]:
        """In this order."""
        yield from map(self._texts.__getitem__, indices)


class Work:
    """One target, one kind of draft, and prompts that are not asked twice.

    Args:
        told: the command line.
        prompts: enough for all repetitions.
        folder: for what is written.
    """

    def __init__(
        self, told: argparse.Namespace, prompts: Sequence[str], cache_dir: Path, folder: Path
    ) -> None:
        self._told, self._folder, self._cache_dir = told, folder, cache_dir
        self._engine_config = TorchEngineConfig(
            dtype=told.dtype,
            num_threads=told.threads,
            max_num_seqs=told.prompts,
            num_pages=told.prompts * (_MAX_LENGTH // PAGE_TOKENS + 1),
        )
        folder_of_model = model_folder(self._engine_config.model, cache_dir)
        self._tokenizer = Tokenizer.load(folder_of_model)
        chats = [
            self._tokenizer.encode_chat([ChatTurn(role="user", content=text)]) for text in prompts
        ]
        self._questions = [
            Question(tuple(chat), 0.0) for chat in chats if len(chat) + told.tokens <= _MAX_LENGTH
        ]
        self.config = DraftTrainingConfig.model_validate(
            {
                "method": told.method,
                "run": {
                    "batch_tokens": told.batch_tokens,
                    "max_length": _MAX_LENGTH,
                    "epochs": told.epochs,
                    "precision": told.dtype,
                },
                "features": {"queue_bytes": told.queue_mb << 20},
            }
        )
        torch.set_num_threads(told.threads)
        self._loaded = load_model(self._engine_config.model, dtype=told.dtype, cache_dir=cache_dir)
        self._method = method_of(self.config, self._loaded.config)
        self._capture = FeatureCapture(
            self._loaded, self._method.aux_layers, max_length=_MAX_LENGTH
        )
        self._answered: list[AnsweredPrompt] = []
        self._flops_per_token = 0.0

    def engine(self) -> Engine:
        """The target as a job starts it."""
        return build_engine(
            self._engine_config,
            cache_dir=self._cache_dir,
            page_store_factory=None,
            speculator=NoSpeculation(),
            detokenize=self._tokenizer.decode,
        )

    async def regenerate(self, engine: Engine, repetition: int) -> Timed:
        """Answer prompts that were not asked before; the last ones are what is trained on."""
        questions = self._asked(repetition)
        path = self._folder / "answers.jsonl"
        path.unlink(missing_ok=True)
        log = AnswerLog(path, fingerprint="bench")
        began = time.perf_counter()
        await regenerate(
            engine,
            questions,
            log,
            max_tokens=self._told.tokens,
            seed=0,
            num_concurrent=len(questions),
            progress=lambda _: None,
        )
        seconds = time.perf_counter() - began
        answers = [log.answers[index] for index in range(len(questions))]
        asked = [question.prompt_token_ids for question in questions]
        self._answered = [
            AnsweredPrompt((*prompt, *answer), len(prompt))
            for prompt, answer in zip(asked, answers, strict=True)
        ]
        shape = self._loaded.config
        flops = sum(
            # The last token is written and never read.
            text_flops(shape, len(prompt) + len(answer) - 1, len(answer))
            for prompt, answer in zip(asked, answers, strict=True)
        )
        return Timed(sum(map(len, answers)), seconds, flops)

    async def decode(self, engine: Engine, repetition: int) -> Timed:
        """The same prompts once more, while all of them decode: no prefill, no tail, no file."""
        times: list[list[tuple[float, int]]] = []
        await asyncio.gather(
            *(self._decode_one(engine, question, times) for question in self._asked(repetition))
        )
        began, ended = max(own[0][0] for own in times), min(own[-1][0] for own in times)
        num_tokens = sum(count for own in times for at, count in own if began < at <= ended)
        lengths = [len(question.prompt_token_ids) for question in self._asked(repetition)]
        shape = self._loaded.config
        context = sum(lengths) // len(lengths) + self._told.tokens // 2
        each = layer_flops(shape) + attention_flops(shape, context) + head_flops(shape)
        return Timed(num_tokens, ended - began, num_tokens * each)

    def capture(self) -> Timed:
        """Features of the answers, kept nowhere."""
        began = time.perf_counter()
        lengths = [text.num_tokens for text in self._capture.texts(self._answered)]
        seconds = time.perf_counter() - began
        # The last logits of a forward are computed twice.
        flops = sum(text_flops(self._loaded.config, length, length + 1) for length in lengths)
        return Timed(sum(lengths), seconds, flops)

    def train(self) -> Timed:
        """Optimiser steps on features in memory."""
        kept = _Kept(list(self._capture.texts(self._answered)))
        trainer = self._trainer(kept)
        began = time.perf_counter()
        num_tokens = self._steps(kept, trainer)
        seconds = time.perf_counter() - began
        if not self._flops_per_token:
            other = self._trainer(kept)
            self._flops_per_token = counted(lambda: self._steps(kept, other)) / num_tokens
        return Timed(num_tokens, seconds, round(num_tokens * self._flops_per_token))

    def offline(self) -> Trained:
        """All features to the disk, then a training that reads them from there."""
        folder = self._folder / "features"
        shutil.rmtree(folder, ignore_errors=True)
        memory, began = PeakMemory(), time.perf_counter()
        store = FeatureStore(folder, fingerprint="bench")
        for _ in store.extend(
            self._capture.texts(self._answered),
            texts_per_shard=_TEXTS_PER_SHARD,
            max_bytes=_MAX_BYTES,
        ):
            pass
        # As if there were more of them than fit into memory.
        for path in folder.iterdir():
            forget(path)
        stored_s = time.perf_counter() - began
        trainer = self._trainer(store)
        num_tokens = self._steps(store, trainer)
        seconds = time.perf_counter() - began
        parts = {
            "capture_and_write_s": stored_s,
            "read_and_train_s": seconds - stored_s,
            "disk_bytes": store.num_bytes,
        }
        return Trained(num_tokens, seconds, parts, *memory.grown(), trainer.state()["model"])

    def online(self) -> Trained:
        """The training takes features from the running target."""
        memory, began = PeakMemory(), time.perf_counter()
        bound = self.config.features.queue_bytes
        source = OnlineTexts(self._capture, self._answered, bound)
        trainer = self._trainer(source)
        num_tokens = self._steps(source, trainer)
        seconds = time.perf_counter() - began
        stats = source.stats
        parts = {
            "target_computes_s": stats.compute_s,
            "target_waits_s": stats.full_s,
            "training_waits_s": stats.empty_s,
            "disk_bytes": 0,
            "queue_max_bytes": stats.max_bytes,
            "queue_most_bytes": stats.most_bytes,
        }
        return Trained(num_tokens, seconds, parts, *memory.grown(), trainer.state()["model"])

    @property
    def bytes_per_token(self) -> float:
        """Of stored features."""
        (text,) = self._capture.texts(self._answered[:1])
        return text.num_bytes / text.num_tokens

    def _asked(self, repetition: int) -> list[Question]:
        count = min(self._told.prompts, len(self._questions))
        places = range(repetition * count, (repetition + 1) * count)
        return [self._questions[place % len(self._questions)] for place in places]

    async def _decode_one(
        self, engine: Engine, question: Question, times: list[list[tuple[float, int]]]
    ) -> None:
        sampling = SamplingParams(
            max_tokens=self._told.tokens, seed=0, ignore_eos=True, temperature=0.0
        )
        request = GenerationRequest(
            request_id=f"decode-{time.perf_counter_ns()}",
            prompt_token_ids=question.prompt_token_ids,
            sampling=sampling,
        )
        own = [
            (time.perf_counter(), len(delta.token_ids))
            async for delta in engine.generate(request)
            if delta.token_ids
        ]
        times.append(own)

    def _trainer(self, texts: _Texts) -> DraftTrainer:
        draft, scale = copy.deepcopy(self._start)
        run = self.config.run
        unrolled = run.objective.model_copy(update={"num_unrolls": self._method.num_unrolls})
        objective = DraftObjective(draft, self._loaded.model, unrolled, scale)
        return DraftTrainer(objective, run, WholePlan(texts.lengths, run).end, "cpu")

    def _steps(self, texts: _Texts, trainer: DraftTrainer) -> int:
        plan = WholePlan(texts.lengths, self.config.run)
        indices = (index for step in plan.steps(0) for batch in step.batches for index in batch)
        num_tokens = 0
        with closing(texts.stream(indices)) as stream:
            for step in plan.steps(0):
                batches = [list(islice(stream, len(batch))) for batch in step.batches]
                report = trainer.step(batches, step.end)
                num_tokens += report.num_tokens
        return num_tokens

    @cached_property
    def _start(self) -> Start:
        """Where every training begins: solved for once, by ``train``, outside of what is timed."""
        written = (
            token for text in self._answered for token in text.token_ids[text.prompt_length :]
        )
        vocab_size = self._loaded.config.vocab_size
        size = min(self.config.run.draft_vocab_size, vocab_size)
        return self._method.start(
            self._loaded,
            draft_vocabulary(written, size, vocab_size),
            lambda: self._capture.texts(self._answered),
        )

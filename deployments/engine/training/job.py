"""The whole way from prompts to a trained draft, in one folder.

Each stage keeps its work as it goes and passes over what is there, so a job that was interrupted,
even by SIGKILL, goes on where it was when it is started again in the same folder::

    answers.jsonl                what the target wrote to given prompts
    features/training/, held-out/    what it computed on that; online only texts/, held-out/
    costs.json                   what steps take here, for predictions
    checkpoint.pt, curve.jsonl   the training
    draft/                       the best draft so far
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING

import torch

from deployments.engine.training.answers import AnswerLog, Question, regenerate
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.feature_store import FeatureStore, fingerprint
from deployments.engine.training.initial import draft_vocabulary
from deployments.engine.training.logged_texts import LoggedTexts
from deployments.engine.training.methods import method_of
from deployments.engine.training.objective import DraftObjective
from deployments.engine.training.online import OnlineTexts
from deployments.engine.training.pace import Pace
from deployments.engine.training.plan import GroupedPlan, WholePlan
from deployments.engine.training.report import JobReport, StageReport
from deployments.engine.training.run import DRAFT_FOLDER, DraftRun
from deployments.engine.training.self_chat import SelfChat
from deployments.engine.training.sharding import ProcessMesh
from deployments.engine.training.step_costs import (
    StepCosts,
    decoding_step,
    rows_needed,
    time_steps,
)
from deployments.engine.training.trainer import DraftTrainer
from deployments.engine.training.tree_shape import TreeShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from deployments.engine.base import Engine
    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.config import DraftTrainingConfig
    from deployments.engine.training.plan import Plan
    from deployments.engine.training.prompt_split import PromptSplit
    from deployments.engine.training.run import CurvePoint
    from deployments.engine.training.self_chat import ChatFrame

_TEXTS_PER_SHARD = 32
_START_TOKENS = 20_000
"""The closed-form start is fitted on so many; more change little."""


class DraftJob:
    """One job; ``answer``, ``capture`` and ``fit`` are called in that order."""

    def __init__(
        self,
        folder: Path,
        config: DraftTrainingConfig,
        prompts: PromptSplit,
        *,
        target_config: ModelConfig,
        target_digest: str,
        progress: Callable[[str], None],
        chat: ChatFrame | None = None,
        is_answering: bool = True,
    ) -> None:
        """Begin a job, or go on with the one that the folder holds.

        Args:
            folder: made where it is missing.
            config: of the job.
            prompts: in the target's tokens.
            target_config: the target's shape.
            target_digest: differs whenever the target's answers might.
            progress: gets short lines for a person to read.
            chat: the target writes the prompts to train on itself, in this frame, and those held
                out where there are none; ``prompts`` has none to train on.
            is_answering: this process writes the answers.

        Raises:
            RunMismatchError: the folder keeps another job.
            UnsupportedModelError: such a draft cannot be made for this kind of target.
            ValueError: the target is too small for such a draft, or cannot be cut so often.
        """
        run = config.run
        self._config = config
        self._folder = folder
        self._progress = progress
        self._method = method_of(config, target_config)
        self._target_config = target_config
        count = config.answers.per_prompt
        self._questions = [
            Question(prompt, config.answers.temperature if sample else 0.0)
            for prompt in prompts.training
            for sample in range(count)
        ]
        self._chat = chat
        self._num_training = config.self_chat.num_texts if chat else len(self._questions)
        self._num_asked = len(self._questions)
        self._questions += [Question(prompt, 0.0) for prompt in prompts.held_out]
        answers = fingerprint(
            target=target_digest,
            questions=blake2b(repr(self._questions).encode()).hexdigest(),
            answers=config.answers.model_dump(),
        )
        self._log = AnswerLog(folder / "answers.jsonl", fingerprint=answers, is_mine=is_answering)
        self._features = fingerprint(
            answers=answers,
            dtype=config.features.dtype,
            max_length=run.max_length,
            layers=self._method.aux_layers,
            **({"chat": chat, "self_chat": config.self_chat.model_dump()} if chat else {}),
        )
        self._is_online = config.features.mode == "online"
        name = "texts" if self._is_online else "training"
        self._training = FeatureStore(folder / "features" / name, fingerprint=self._features)
        self._held_out = FeatureStore(folder / "features" / "held-out", fingerprint=self._features)
        asked, seed = self._questions[: self._num_asked], run.seed
        self._logged: LoggedTexts | None = None
        if config.features.group_texts and not chat:
            self._logged = LoggedTexts(asked, self._log, max_length=run.max_length, seed=seed)

    @property
    def trains_while_answering(self) -> bool:
        """Whether the other stages may begin beside ``answer``."""
        return self._logged is not None

    def end_answers(self, error: BaseException) -> None:
        """No more answers come: raise this in a stage that waits for one."""
        self._log.end(error)

    @property
    def is_answered(self) -> bool:
        """Whether ``answer`` has nothing left to do."""
        return len(self._log.answers) == len(self._questions)

    async def answer(self, engine: Engine, num_concurrent: int) -> None:
        """Let the target write what is missing; see ``regenerate``."""
        await regenerate(
            engine,
            self._questions,
            self._log,
            max_tokens=self._config.answers.max_tokens,
            seed=self._config.answers.seed,
            num_concurrent=num_concurrent,
            progress=self._progress,
            order=[*self._asked_to_hold_out, *self._logged.order] if self._logged else None,
        )

    def capture(self, loaded: LoadedModel) -> None:
        """Store features of all answers that have none yet, and measure what steps take."""
        self._measure(loaded)
        if self._chat:
            self._talk(loaded, self._chat)
        capture = self._capture_of(loaded)
        if self._logged:
            self._log.wait_for(self._asked_to_hold_out)
        stores = [(self._held_out, self._held_out_texts())]
        if not self._is_online:
            stores.append((self._training, self._texts()))
        for store, answered in stores:
            missing = answered[store.num_texts :]
            pace = Pace("features", len(answered), self._progress, done=store.num_texts)
            shards = store.extend(
                self._paced(capture.texts(missing), pace),
                texts_per_shard=_TEXTS_PER_SHARD,
                max_bytes=self._config.features.max_bytes,
            )
            for _ in shards:
                pass
        if left_out := self._num_left_out:
            self._progress(
                f"warning: {left_out} of {self._num_training} texts are left out: "
                "training.features.max_bytes is reached"
            )

    def _talk(self, loaded: LoadedModel, frame: ChatFrame) -> None:
        """Let the target write texts; its own forwards give the features."""
        wanted: list[tuple[FeatureStore, str, int, tuple[float, ...] | None]] = [
            (self._training, "training", self._num_training, None)
        ]
        if self._num_asked == len(self._questions):
            wanted.insert(
                0, (self._held_out, "held-out", self._config.answers.held_out_prompts, (0.0,))
            )
        for store, name, count, temperatures in wanted:
            missing = count - store.num_texts
            if missing <= 0:
                continue
            # What was under way when a job was killed is lost; other texts take its place.
            seed = f"{self._config.self_chat.seed}/{name}/{store.num_texts}"
            chat = SelfChat(
                loaded,
                frame,
                self._method.aux_layers,
                self._config.self_chat,
                seed=seed,
                dtype=getattr(torch, self._config.features.dtype),
            )
            pace = Pace(f"{name} texts", count, self._progress, done=store.num_texts)
            texts: Iterator[FeatureText] = islice(chat.texts(temperatures), missing)
            if self._is_online and store is self._training:
                texts = (text.without_features() for text in texts)
            shards = store.extend(
                self._paced(texts, pace),
                texts_per_shard=_TEXTS_PER_SHARD,
                max_bytes=self._config.features.max_bytes,
            )
            for _ in shards:
                pass

    def fit(self, loaded: LoadedModel) -> JobReport:
        """Train the draft on what was captured, together with the other processes of a group.

        Args:
            loaded: the target, on the device of the training.

        Raises:
            RunMismatchError: the folder's checkpoint is of other settings or texts.
        """
        config = self._config.run
        texts = self._training_texts(loaded)
        known = self._known_texts(loaded, texts)
        self._progress("solving for the start")
        vocabulary = self._draft_vocabulary(known)
        draft, scale = self._method.start(loaded, vocabulary, lambda: _first_texts(known))
        num_weights = sum(weight.numel() for weight in draft.parameters())
        device = loaded.model.device
        unrolled = config.objective.model_copy(update={"num_unrolls": self._method.num_unrolls})
        objective = DraftObjective(draft, loaded.model, unrolled, scale).to(device)
        mesh = ProcessMesh.of_default_group(self._config.tensor_parallel, device.type)
        mesh.shard(objective)
        plan = self._plan(texts)
        run = DraftRun(
            self._folder,
            DraftTrainer(objective, config, plan.end, str(device), mesh),
            config,
            texts,
            plan,
            self._held_out,
            self._progress,
            fingerprint=fingerprint(
                features=self._features,
                num_texts=len(self._logged or texts.lengths),
                method=self._config.method,
                student=self._config.student.model_dump(),
                **({"group_texts": self._config.features.group_texts} if self._logged else {}),
            ),
            costs=StepCosts.read(self._costs_path),
        )
        best = run.run()
        return self._report(run, best, num_weights, texts)

    @property
    def draft_folder(self) -> Path:
        """Where the best draft is."""
        return self._folder / DRAFT_FOLDER

    @property
    def _costs_path(self) -> Path:
        return self._folder / "costs.json"

    def _measure(self, loaded: LoadedModel) -> None:
        """Keep what steps take, once in a folder: a run's predictions are to be comparable."""
        if self._costs_path.is_file():
            return
        self._progress("measuring steps")
        config, given = self._config.run, self._config.costs
        target_rows, draft_rows = rows_needed(
            config.num_draft_tokens, TreeShape(config.tree_widths)
        )
        target = given.target_step_s or time_steps(decoding_step(loaded), target_rows)
        draft = given.draft_step_s
        if not draft:
            size = min(config.draft_vocab_size, self._target_config.vocab_size)
            draft = time_steps(self._method.drafting_step(loaded, size), draft_rows)
        StepCosts(target_s=target, draft_s=draft).write(self._costs_path)

    def _capture_of(self, loaded: LoadedModel) -> FeatureCapture:
        return FeatureCapture(
            loaded,
            self._method.aux_layers,
            max_length=self._config.run.max_length,
            dtype=getattr(torch, self._config.features.dtype),
        )

    def _training_texts(self, loaded: LoadedModel) -> FeatureStore | OnlineTexts:
        if not self._is_online:
            return self._training
        capture, bound = self._capture_of(loaded), self._config.features.queue_bytes
        if self._logged:
            return OnlineTexts(capture, self._logged, bound, self._logged.closed)
        own_chats = map(AnsweredPrompt.of, self._training) if self._chat else None
        return OnlineTexts(capture, list(own_chats or self._texts()), bound)

    def _known_texts(
        self, loaded: LoadedModel, texts: FeatureStore | OnlineTexts
    ) -> FeatureStore | OnlineTexts:
        """Those that are there when the training begins."""
        if not self._logged:
            return texts
        run, features = self._config.run, self._config.features
        first = [text for text in self._logged[: features.group_texts] if text.fits(run.max_length)]
        return OnlineTexts(self._capture_of(loaded), first, features.queue_bytes)

    def _plan(self, texts: FeatureStore | OnlineTexts) -> Plan:
        run, features = self._config.run, self._config.features
        if not self._logged:
            return WholePlan(texts.lengths, run)
        count = len(self._logged)
        return GroupedPlan(count, features.group_texts, self._logged.lengths_of, run)

    @property
    def _num_left_out(self) -> int:
        if not self._is_online or self._chat:
            return self._num_training - self._training.num_texts
        # Others may not be answered yet.
        answered = [index for index in range(self._num_asked) if index in self._log.answers]
        return len(answered) - len(self._answered(answered))

    def _report(
        self, run: DraftRun, best: CurvePoint, num_weights: int, texts: FeatureStore | OnlineTexts
    ) -> JobReport:
        stores = (self._training, self._held_out)
        answers = list(self._log.answers.values())
        queue = texts.stats if isinstance(texts, OnlineTexts) else None
        return JobReport(
            is_self_chat=self._chat is not None,
            answers=StageReport(
                num_texts=len(answers),
                num_tokens=sum(map(len, answers)),
                seconds=self._log.seconds,
            ),
            features=StageReport(
                num_texts=sum(store.num_texts for store in stores),
                num_tokens=sum(sum(store.lengths) for store in stores),
                seconds=sum(store.seconds for store in stores),
            ),
            num_features_bytes=sum(store.num_bytes for store in stores),
            queue=queue,
            num_left_out=self._num_left_out,
            num_weights=num_weights,
            curve=tuple(run.curve),
            best=best,
            costs=StepCosts.read(self._costs_path),
        )

    def _answered(self, indices: Iterable[int]) -> list[AnsweredPrompt]:
        """The texts among these questions that can be used, in order."""
        texts = []
        for index in indices:
            prompt = self._questions[index].prompt_token_ids
            texts.append(AnsweredPrompt((*prompt, *self._log.answers[index]), len(prompt)))
        return [text for text in texts if text.fits(self._config.run.max_length)]

    def _texts(self) -> list[AnsweredPrompt]:
        return self._answered(range(self._num_asked))

    def _held_out_texts(self) -> list[AnsweredPrompt]:
        return self._answered(self._asked_to_hold_out)

    @property
    def _asked_to_hold_out(self) -> range:
        return range(self._num_asked, len(self._questions))

    def _draft_vocabulary(self, texts: FeatureStore | OnlineTexts) -> torch.Tensor:
        written = (token for answer in texts.answers() for token in answer.tolist())
        vocab_size = self._target_config.vocab_size
        size = min(self._config.run.draft_vocab_size, vocab_size)
        return draft_vocabulary(written, size, vocab_size)

    @staticmethod
    def _paced(texts: Iterable[FeatureText], pace: Pace) -> Iterator[FeatureText]:
        for text in texts:
            yield text
            pace.advance(text.num_tokens)


def _first_texts(texts: Iterable[FeatureText]) -> Iterator[FeatureText]:
    num_tokens = 0
    for text in texts:
        yield text
        num_tokens += text.num_tokens
        if num_tokens >= _START_TOKENS:
            return

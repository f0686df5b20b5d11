"""Makes a draft for a configuration's model: the work behind ``paceline train draft``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.draft_answers import Answering
from cluster.draft_card import DraftCard, write_card
from cluster.draft_curve import draw_curve, points_of
from cluster.draft_fit import JobPlan, capture_and_fit, check_processes, open_job
from cluster.errors import ConfigError
from cluster.live_curve import LiveCurve
from cluster.training_prompts import (
    NO_LICENCE,
    PromptSource,
    builtin_prompts,
    chat_frame,
    read_prompts,
)
from deployments.engine.errors import UnsupportedModelError, WeightsMismatchError
from deployments.model_files import served_model_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.config import ClusterConfig
    from deployments.engine.training.report import JobReport
    from deployments.tokenizer import Tokenizer


def train_draft(
    config: ClusterConfig,
    folder: Path,
    *,
    prompt_files: Sequence[Path],
    licences: Sequence[str],
    held_out_files: Sequence[Path],
    self_chat: bool,
    command_line: str,
    on_progress: Callable[[str], None],
) -> tuple[JobReport, Path]:
    """Train a draft from prompts to a folder that can be loaded; or go on where that was left.

    Args:
        config: the target, and ``training``.
        folder: of the job; the same folder and settings go on with an interrupted one.
        prompt_files: see ``training_prompts``; the package's own where there are none.
        licences: of the prompt files, one each, or none at all.
        held_out_files: prompts for evaluations; some of the others where there are none.
        self_chat: the target writes the prompts to train on itself; there are no files of them.
        command_line: for the card.
        on_progress: told what happens, a short line at a time.

    Returns:
        What was done, and the draft's folder: weights, card and, with matplotlib, the curve.

    Raises:
        WeightsMissingError: the model is not here.
        ConfigError: a file, a setting or the folder is wrong.
        ClusterStartError: there is no Ray for several training processes.
        TrainingError: several processes cannot train, or too many were lost.
    """
    from deployments.engine.training.errors import RunMismatchError
    from deployments.engine.training.prompt_split import split_prompts
    from deployments.engine.training.self_chat import longest_text
    from deployments.model_files import context_length, model_folder
    from deployments.tokenizer import Tokenizer

    check_processes(config.training)
    engine = config.engine
    own = Path(engine.model)
    model = model_folder(engine.model, config.cache_dir)
    tokenizer = Tokenizer.load(model)
    if self_chat and (prompt_files or licences):
        raise ConfigError(("--self-chat: takes no --prompts and no --licence, it writes its own",))
    if self_chat and config.training.features.group_texts:
        raise ConfigError(("training.features.group_texts: not with --self-chat",))
    chat = chat_frame(tokenizer) if self_chat else None
    sources = [] if chat else _sources(prompt_files, licences, tokenizer)
    held_out = [read_prompts(path, NO_LICENCE, tokenizer, "--held-out") for path in held_out_files]
    longest = min(context_length(engine, model), config.training.run.max_length)
    if chat and (needed := longest_text(chat, config.training.self_chat)) > longest:
        raise ConfigError(
            (
                f"training.self_chat: texts of up to {needed} tokens; context and "
                f"training.run.max_length allow {longest}",
            )
        )
    try:
        prompts = split_prompts(
            (prompt for source in sources for prompt in source.prompts),
            (prompt for source in held_out for prompt in source.prompts),
            num_held_out=config.training.answers.held_out_prompts,
            max_prompt_tokens=longest - 1,
            seed=config.training.answers.seed,
            is_self_chat=self_chat,
        )
        plan = JobPlan(
            # Other processes have other working folders.
            engine.model_copy(update={"model": str(own.resolve())}) if own.is_dir() else engine,
            config.cache_dir.resolve(),
            config.training,
            folder.resolve(),
            prompts,
            chat,
        )
        on_progress = LiveCurve(plan.folder, on_progress)
        job = open_job(plan, on_progress)
    except ValueError as error:
        raise ConfigError((str(error),)) from error
    except RunMismatchError as error:
        raise ConfigError((f"--out: {error}",)) from error
    except UnsupportedModelError as error:
        raise ConfigError((f"engine.model: {error}",)) from error
    if chat:
        on_progress(f"{config.training.self_chat.num_texts} texts of the target's own to train on")
    else:
        on_progress(
            f"{len(prompts.training)} prompts to train on, {len(prompts.held_out)} held out, "
            f"{prompts.num_dropped} repeated or too long"
        )
    try:
        with Answering(config, tokenizer.decode, job, on_progress) as answering:
            report = capture_and_fit(plan, job, on_progress, answering.check)
    except RunMismatchError as error:
        raise ConfigError((f"--out: {error}",)) from error
    except (UnsupportedModelError, WeightsMismatchError) as error:
        raise ConfigError((f"engine.model: {error}",)) from error
    has_picture = draw_curve(
        points_of(report), job.draft_folder / "curve.png", report.best.quality.coverage
    )
    card = DraftCard(
        target=served_model_name(engine),
        sources=tuple(sources),
        held_out=tuple(held_out),
        num_training_prompts=len(prompts.training),
        num_held_out_prompts=len(prompts.held_out) or config.training.answers.held_out_prompts,
        training=config.training,
        report=report,
        command_line=command_line,
        has_picture=has_picture,
    )
    write_card(card, job.draft_folder)
    return report, job.draft_folder


def _sources(
    prompt_files: Sequence[Path], licences: Sequence[str], tokenizer: Tokenizer
) -> list[PromptSource]:
    if licences and len(licences) != len(prompt_files):
        raise ConfigError(
            (f"--licence: {len(licences)} for {len(prompt_files)} files of --prompts",)
        )
    if not prompt_files:
        return [builtin_prompts(tokenizer)]
    stated = licences or [NO_LICENCE] * len(prompt_files)
    return [
        read_prompts(path, licence, tokenizer, "--prompts")
        for path, licence in zip(prompt_files, stated, strict=True)
    ]
